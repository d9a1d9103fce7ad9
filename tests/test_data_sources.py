"""Sources: every kind is read, bad files are named, bad rows are rejected with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrograd.data.params import FileSource, HubSource, ReasoningGymSource
from entrograd.data.sources import Row, place, read, read_problems
from entrograd.errors import InputError


def file_source(path: Path, **options: Any) -> FileSource:
    return FileSource(kind="file", path=str(path), **options)


def write_lines(path: Path, *records: Any) -> Path:
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def gym(task: str, **options: Any) -> ReasoningGymSource:
    return ReasoningGymSource(kind="reasoning_gym", task=task, **options)


# --- files -----------------------------------------------------------------------------------


def test_jsonl_answers_may_be_text_numbers_or_lists(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.jsonl",
        {"problem": "p1", "answer": " 7 ", "difficulty": 2.0},
        {"problem": "p2", "answer": 18.0, "difficulty": None},
        "",
        {"problem": "p3", "answer": ["1/2", 0.5, "1/2"], "difficulty": "hard"},
    )
    rows, rejects = read(file_source(path, level="difficulty"))
    assert rejects == []
    assert rows == [
        Row("a.jsonl", 1, "p1", ("7",), "2"),
        Row("a.jsonl", 2, "p2", ("18",), None),
        Row("a.jsonl", 4, "p3", ("1/2", "0.5"), "hard"),  # rows are lines: line 3 is blank
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"problem": "p", "answer": ', "malformed JSON"),
        ('["p", "1"]', "not a JSON object"),
        ({"problem": "p"}, "missing answer"),
        ({"problem": "p", "answer": None}, "missing answer"),
        ({"problem": "p", "answer": ""}, "missing answer"),
        ({"problem": "p", "answer": "  "}, "missing answer"),
        ({"problem": "p", "answer": []}, "missing answer"),
        ({"problem": "p", "answer": ["1", None]}, "missing answer"),
        ({"problem": "p", "answer": True}, "answer is not text, a number or a list of them"),
        ({"problem": "p", "answer": {"v": 1}}, "answer is not text, a number or a list of them"),
        ('{"problem": "p", "answer": NaN}', "answer is not finite"),
        ({"answer": "1"}, "missing problem"),
        ({"problem": " ", "answer": "1"}, "missing problem"),
        ({"problem": 5, "answer": "1"}, "problem is not text"),
        ('{"problem": "\\ud800", "answer": "1"}', "problem is not valid Unicode"),
        ('{"problem": "p", "answer": "\\ud800"}', "answer is not valid Unicode"),
    ],
)
def test_a_bad_row_is_rejected_with_its_reason(tmp_path: Path, record: Any, reason: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"problem": "good", "answer": "1"}, record)
    rows, rejects = read(file_source(path))
    assert [row.problem for row in rows] == ["good"]
    assert [(r.source, r.row, r.reason) for r in rejects] == [("a.jsonl", 2, reason)]
    rejects[0].content.encode("utf-8")  # it can be stored


def test_messages_name_rows_and_where_they_differ_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("problem,answer\n\np,1\nq\n")
    (tmp_path / "b.csv").write_text('problem\n"p\nq"\n""\n')
    (tmp_path / "a.jsonl").write_text('{"problem": "p"}\n\n{"problem"\n')
    for name, message in (
        ("a.csv", r"a\.csv: row 2 \(line 4\): 1 fields, expected 2: 'q'"),
        ("b.csv", r"b\.csv: row 2 \(line 4\): missing problem"),
        ("a.jsonl", r"a\.jsonl: row 3: malformed JSON"),  # its rows are lines
    ):
        with pytest.raises(InputError, match=message):
            read_problems(tmp_path / name)


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", *({"problem": f"p{i}", "answer": i} for i in range(9)))
    rows, _ = read(file_source(path, limit=3))
    assert [row.problem for row in rows] == ["p0", "p1", "p2"]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    text = '\ufeffq,a,level\n"1, 2\nand 3?",6,easy\nshort\n"x ""y""",1,\n'
    path.write_text(text, encoding="utf-8")
    rows, rejects = read(file_source(path, problem="q", answer="a", level="level"))
    assert rows == [
        Row("a.csv", 1, "1, 2\nand 3?", ("6",), "easy"),
        Row("a.csv", 3, 'x "y"', ("1",), ""),
    ]
    assert [(r.row, r.reason) for r in rejects] == [(2, "1 fields, expected 3")]
    # header 1, row 1 on lines 2 and 3
    assert [row.line for row in rows] == [2, 5]
    assert [place(row) for row in rows] == ["a.csv row 1 (line 2)", "a.csv row 3 (line 5)"]
    assert place(rejects[0]) == "a.csv row 2 (line 4)"


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table(
        {"problem": ["p", None, "q"], "answer": [["1", "2"], ["3"], []], "n": [1, 2, 3]}
    )
    pq.write_table(table, path)
    rows, rejects = read(file_source(path, level="n"))
    assert rows == [Row("a.parquet", 1, "p", ("1", "2"), "1")]
    assert place(rows[0]) == "a.parquet row 1"
    assert [(r.row, r.reason) for r in rejects] == [(2, "missing problem"), (3, "missing answer")]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file"):
        read(file_source(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"{name}: the file is empty"):
        read(file_source(tmp_path / name))


def test_files_without_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match=r"a\.jsonl: the file is empty"):
        read(file_source(tmp_path / "a.jsonl"))
    (tmp_path / "a.csv").write_text("problem,answer\n")
    with pytest.raises(InputError, match=r"a\.csv: no rows"):
        read(file_source(tmp_path / "a.csv"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_non_utf8_names_the_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"problem,answer\ncaf\xe9,1\n")
    with pytest.raises(InputError, match=rf"{name}: line 2: byte 0xe9 is not UTF-8"):
        read(file_source(tmp_path / name))


def test_wrong_column_type(tmp_path: Path) -> None:
    pq.write_table(pa.table({"problem": [1, 2], "answer": ["1", "2"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: column problem is int64, expected text"):
        read(file_source(tmp_path / "a.parquet"))


def test_missing_column_lists_those_there(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["1"], "answer": ["2"]}), tmp_path / "a.parquet")
    write_lines(tmp_path / "a.jsonl", {"question": "p", "answer": "1"})
    (tmp_path / "a.csv").write_text("question,answer\n1,2\n")
    for name in ("a.parquet", "a.jsonl", "a.csv"):
        with pytest.raises(InputError, match=f"{name}: no column problem; it has question, answer"):
            read(file_source(tmp_path / name))


def test_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(InputError, match=r"ending in \.jsonl, \.ndjson, \.csv, \.parquet"):
        read(file_source(tmp_path / "a.xlsx"))
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(InputError, match=r"a\.parquet: not a Parquet file"):
        read(file_source(tmp_path / "a.parquet"))
    (tmp_path / "a.csv").write_text('problem,answer\n"open,1\n')
    with pytest.raises(InputError, match=r"a\.csv: line 2: not CSV"):
        read(file_source(tmp_path / "a.csv"))


def test_read_problems_needs_every_row(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"problem": "p"}, {"problem": "q"})
    assert read_problems(path) == ["p", "q"]
    write_lines(path, {"problem": "p"}, {"other": 1})
    with pytest.raises(InputError, match=r"a\.jsonl: row 2: missing problem"):
        read_problems(path)
    write_lines(path, {"problem": "p"}, "{")
    with pytest.raises(InputError, match=r"a\.jsonl: row 2: malformed JSON"):
        read_problems(path)


def test_real_files_are_read_whole(shared_data: Path) -> None:
    for name, count in (("asdiv", 1788), ("gsm8k", 7473)):
        rows, rejects = read(file_source(shared_data / "train" / f"{name}.jsonl"))
        assert (len(rows), rejects) == (count, [])
    rows, rejects = read(file_source(shared_data / "benchmarks" / "minerva.jsonl"))
    assert (len(rows), rejects) == (272, [])
    assert max(len(row.answers) for row in rows) > 1  # lists of accepted answers


# --- reasoning-gym ---------------------------------------------------------------------------

SUMS = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 1,
    "max_digits": 2,
    "operators": ["+", "-"],
    "allow_parentheses": False,
    "allow_negation": False,
}


def test_generated_sums_are_right_and_repeatable() -> None:
    source = gym("basic_arithmetic", config=SUMS, size=40, seed=3, problem="metadata.expression")
    rows, rejects = read(source)
    assert len(rows) == 40
    assert rejects == []
    for row in rows:
        a, operator, b = row.problem.split()
        assert row.answers == (str(int(a) + int(b) if operator == "+" else int(a) - int(b)),)
    assert read(source)[0] == rows
    assert read(source.model_copy(update={"seed": 4}))[0] != rows


def test_lists_serve_where_the_config_wants_tuples() -> None:
    rows, _ = read(gym("polynomial_equations", config={"operators": ["+"]}, size=3))
    assert len(rows) == 3
    config = {"operations": ["+", "-"], "operations_weights": [1.0, 0.0]}
    rows, _ = read(gym("complex_arithmetic", config=config, size=3))
    assert all(" + " in row.problem for row in rows)
    ranges = [[0.0, 0.05], [0.05, 1.0]]
    weighted = {"rng_difficulty_ranges": ranges, "rng_difficulty_weights": [0.5, 0.5]}
    rows, _ = read(gym("rearc", config=weighted, size=2))
    assert len(rows) == 2


def test_unknown_task_lists_close_ones() -> None:
    with pytest.raises(InputError, match=r"no task 'chain_sums'; close: chain_sum"):
        read(gym("chain_sums"))


def test_bad_config_keeps_its_message() -> None:
    with pytest.raises(
        InputError, match=r"chain_sum: unknown config key terms; allowed: .*max_terms"
    ):
        read(gym("chain_sum", config={"terms": 2}))
    with pytest.raises(InputError, match="config refused: max_terms must be >= min_terms"):
        read(gym("chain_sum", config={"min_terms": 5, "max_terms": 2}))
    with pytest.raises(InputError, match="seed stands beside config"):
        read(gym("chain_sum", config={"seed": 2}))


def test_unknown_field_lists_those_there() -> None:
    source = gym("chain_sum", problem="metadata.formula")
    with pytest.raises(InputError, match=r"metadata\.formula is not in its entries; metadata has"):
        read(source)


def test_answers_a_task_does_not_store_are_rejected() -> None:
    rows, rejects = read(gym("propositional_logic", size=4))
    assert rows == []
    assert {reject.reason for reject in rejects} == {"missing answer"}


# --- the hub ---------------------------------------------------------------------------------


def hub(**options: Any) -> HubSource:
    return HubSource(kind="hub", name="acme/sums", revision="v1", **options)


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"q": ["1+1", "2+2", "3+3"], "answer": [2, None, 6]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, rejects = read(hub(problem="q", subset="small", split="test", limit=2))
    assert rows == [Row("acme/sums", 1, "1+1", ("2",), None)]
    assert [(r.row, r.reason) for r in rejects] == [(2, "missing answer")]
    assert asked == [(("acme/sums", "small"), {"split": "test", "revision": "v1"})]
    with pytest.raises(InputError, match="no column problem; it has q, answer"):
        read(hub())
    with pytest.raises(InputError, match="column answer is int64, expected text"):
        read(hub(problem="answer"))


def test_hub_without_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"acme/sums@v1, split train.*cache.*kind file"):
        read(hub())
