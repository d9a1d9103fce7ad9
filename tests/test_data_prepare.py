"""Normalisation, duplicates, the content split and overlap, each on cases worked by hand."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrograd.cli import main as cli
from entrograd.data.decontaminate import find_overlaps, report, sequences, templates
from entrograd.data.deduplicate import deduplicate
from entrograd.data.normalise import normalise, prompt_id
from entrograd.data.sources import Row, read_problems
from entrograd.data.split import split


def row(number: int, problem: str, *answers: str) -> Row:
    return Row("s", number, problem, answers, None)


# --- normalisation ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is  7+5?", "what is 7 + 5"),
        ("Janet’s \n eggs.", "janet's eggs"),
        ("It costs $1,000, no?", "It costs 1000 no"),
        ("a pie-eating contest", "a pie eating contest"),
        ("ｘ² ＝ ４", "x2 = 4"),  # compatibility forms
        ("5 − 3", "5 - 3"),  # the minus sign and the hyphen
        ("STRASSE", "straße"),
        ("Help! Now.", "help now"),
    ],
)
def test_dress_makes_no_difference(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("4 - 1", "4 + 1"),
        ("1.5", "15"),
        ("2 * (3 + 4)", "2 * 3 + 4"),
        ("5!", "5"),
        ("f(1,2)", "f(12)"),
        ("f'(x)", "f(x)"),
        ("4 - 1", "- 4 1"),
        ("10%", "10"),
    ],
)
def test_substance_does(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


# --- duplicates ------------------------------------------------------------------------------


def test_the_first_of_duplicates_is_kept_in_order() -> None:
    rows = [
        row(1, "7 + 5", "12"),
        row(2, "9", "9"),
        row(3, "7+5?", "12", "twelve"),
        row(4, "x", "1"),
    ]
    kept, duplicates, rejects = deduplicate(rows)
    assert [r.row for r in kept] == [1, 2, 4]
    assert [r.row for r in duplicates] == [3]
    assert rejects == []


def test_conflicting_answers_are_all_rejected() -> None:
    rows = [row(1, "7 + 5", "12"), row(2, "7+5", "13"), row(3, "9", "9"), row(4, "7 +5", "12")]
    kept, duplicates, rejects = deduplicate(rows)
    assert [r.row for r in kept] == [3]
    assert duplicates == []
    assert [(r.row, r.reason) for r in rejects] == [(n, "conflicting answers") for n in (1, 2, 4)]
    assert rejects[0].content == "7 + 5 -> 12, but 13 in s row 2"


# --- split and ids ---------------------------------------------------------------------------


def test_the_split_is_the_hash_of_the_normalised_problem() -> None:
    # sha256 of the text and a zero byte, its first 13 hex digits over 16^13
    for problem in ("7 + 5", "9 - 4", "what is x"):
        number = int(hashlib.sha256(problem.encode() + b"\0").hexdigest()[:13], 16) / 16**13
        assert split(problem, number) == "train"  # below the share only
        assert split(problem, min(1.0, number + 1e-9)) == "heldout"
        assert split(problem.upper() + "  ", number + 1e-9) == "heldout"
    assert split("anything", 0.0) == "train"
    assert split("anything", 1.0) == "heldout"


def test_the_split_has_about_the_share_asked_for() -> None:
    held = sum(split(f"{i} + {i * 7}", 0.1) == "heldout" for i in range(4000))
    assert 320 < held < 480  # 400 expected, standard deviation 19


def test_prompt_ids_depend_on_problem_and_answers() -> None:
    ids = {prompt_id("a", ("1",)), prompt_id("a", ("2",)), prompt_id("a", ("1", "2"))}
    ids |= {prompt_id("a1", ()), prompt_id("b", ("1",))}
    assert len(ids) == 5
    assert prompt_id("a", ("1",)) == hashlib.sha256(b"a\x001\x00").hexdigest()[:16]


# --- overlap ---------------------------------------------------------------------------------


def test_exact_and_shared_sequences_by_hand() -> None:
    train = [
        "one two three four five six",  # 4 sequences of 3 words, 2 of them in row 0: 1/2
        "One two,   three four nine ten eleven?",  # 5 sequences, 2 in row 0: 2/5
        "Seven eight!",  # equal to row 1, though shorter than a sequence
        "seven nine",
    ]
    bench = ["zero one two three four", "seven eight"]
    found = find_overlaps(train, {"b": bench}, ngram=3, fraction=0.5)
    assert {i: (m.kind, m.benchmark_row, m.fraction) for i, m in found["b"].items()} == {
        0: ("ngram", 0, 0.5),
        1: ("benchmark_ngram", 0, 2 / 3),  # of the 3 sequences of row 0
        2: ("exact", 1, 1.0),
    }
    lower = find_overlaps(train, {"b": bench}, ngram=3, fraction=0.4)
    assert {i: (m.kind, m.fraction) for i, m in lower["b"].items()} == {
        0: ("ngram", 0.5),
        1: ("ngram", 0.4),
        2: ("exact", 1.0),
    }
    assert set(find_overlaps(train, {"b": bench}, ngram=3, fraction=0.7)["b"]) == {2}


def test_sequences_must_stand_in_one_row() -> None:
    train = ["one two three four five six"]
    bench = ["one two three", "two three four", "three four five"]  # one sequence each: 1/4
    assert find_overlaps(train, {"b": bench}, ngram=3, fraction=0.5)["b"] == {}


def test_the_index_agrees_with_comparing_every_pair() -> None:
    draw = random.Random(0)
    train, bench = (
        [" ".join(draw.choices("abcd", k=draw.randrange(5, 9))) for _ in range(60)]
        for _ in range(2)
    )
    texts = [normalise(text) for text in train]
    ignored = templates(texts, 3)

    def share(text: str, other: str) -> float:
        mine = sequences(text, 3) - ignored
        return len(mine & sequences(other, 3)) / len(mine) if mine else 0.0

    def kind(text: str) -> str | None:
        others = [normalise(other) for other in bench]
        if text in others:
            return "exact"
        if any(share(text, other) >= 0.5 for other in others):
            return "ngram"
        return "benchmark_ngram" if any(share(other, text) >= 0.5 for other in others) else None

    expected = {i: kind(text) for i, text in enumerate(texts) if kind(text)}
    found = find_overlaps(train, {"b": bench}, 3, 0.5)["b"]
    assert {i: match.kind for i, match in found.items()} == expected
    assert 0 < len(expected) < len(train)
    assert set(expected.values()) >= {"ngram", "benchmark_ngram"}


def test_a_problem_within_a_longer_row_is_found() -> None:
    before = " ".join(f"filler{i}" for i in range(80))
    long = "A farmer has 17 sheep and buys 5 more at the fair. How many sheep does he have now?"
    other = "A baker has 17 rolls and bakes 5 more in the night. How many rolls does he have then?"
    train = [f"{before} {long} {before}", f"{before} {other}"]
    found = find_overlaps(train, {"b": ["something else", long]}, ngram=13, fraction=0.5)["b"]
    assert {i: (m.kind, m.benchmark_row, m.fraction) for i, m in found.items()} == {
        0: ("benchmark_ngram", 1, 1.0)
    }
    # it has 19 words, so 7 sequences of 13; of its first 10, 15 and 16 words 0, 3 and 4 of them
    cut = [f"{before} {' '.join(long.split()[:count])}" for count in (10, 15, 16)]
    found = find_overlaps(cut, {"b": [long]}, ngram=13, fraction=0.5)["b"]
    assert {i: (m.kind, m.fraction) for i, m in found.items()} == {2: ("benchmark_ngram", 4 / 7)}


def test_a_short_problem_within_a_longer_row_is_found() -> None:
    short = "Find the units digit of $18^6$."
    train = [
        f"Solve the following problem. {short}",
        f"{short} Show your work, step by step.",
        "Find the units digit of 18^61.",  # another number
        "Find the units digit of 118^6.",
        "Please find the last digit of 18^6.",
        "Calculate this: what is 2 + 2? Then double it.",  # four words alone
    ]
    bench = ["What is 2 + 2 ?", short, "Find the units digit"]
    found = find_overlaps(train, {"b": bench}, ngram=13, fraction=0.5)["b"]
    assert {i: (m.kind, m.benchmark_row, m.fraction) for i, m in found.items()} == {
        0: ("contains", 1, 1.0),
        1: ("contains", 1, 1.0),
    }
    # of several, the longest
    bench = ["Find the units digit of", "Find the units digit of 18 ^ 6", "the units digit of 18"]
    found = find_overlaps(train[:1], {"b": bench}, ngram=13, fraction=0.5)["b"]
    assert found[0].benchmark_row == 1


def test_a_sum_within_a_longer_sum_is_another_problem() -> None:
    bench = ["3 + 4 + 5 + 6", "Calculate 3 + 4 + 5"]
    train = ["2 + 3 + 4 + 5 + 6 + 7", "Calculate 3 + 4 + 5 + 6"]
    assert find_overlaps(train, {"b": bench}, ngram=13, fraction=0.5)["b"] == {}


def test_the_wording_of_a_template_is_no_overlap() -> None:
    wording = "state the final answer to the following arithmetic problem please"
    train = [f"{wording} {i} + {i + 1}" for i in range(40)]
    bench = [f"{wording} {i} + {i + 1}" for i in (3, 100)]
    found = find_overlaps(train, {"b": bench}, ngram=5, fraction=0.5)
    assert {i: m.kind for i, m in found["b"].items()} == {3: "exact"}


def test_report_counts_rows_once() -> None:
    train = ["a b c d", "e f"]
    benchmarks = {"x": ["a b c z", "e f"], "y": ["E F"]}
    found = find_overlaps(train, benchmarks, ngram=3, fraction=0.5)
    made = report(train, benchmarks, found, 3, 0.5)
    assert made["train_rows"] == 2
    assert made["overlapping_rows"] == 2
    assert made["by_benchmark"] == {
        "x": {
            "benchmark_rows": 2,
            "rows": 2,
            "exact": 1,
            "ngram": 1,
            "benchmark_ngram": 0,
            "contains": 0,
        },
        "y": {
            "benchmark_rows": 1,
            "rows": 1,
            "exact": 1,
            "ngram": 0,
            "benchmark_ngram": 0,
            "contains": 0,
        },
    }
    assert made["examples"][0] == {
        "benchmark": "x",
        "kind": "ngram",
        "fraction": 0.5,
        "train_row": 1,
        "train_problem": "a b c d",
        "benchmark_row": 1,
        "benchmark_problem": "a b c z",
    }


# --- the command -----------------------------------------------------------------------------


def test_overlap_command_on_real_files(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = shared_data / "benchmarks" / "gsm8k.jsonl"
    leaked = read_problems(bench)[5:8]
    train = tmp_path / "train.jsonl"
    own = (shared_data / "train" / "asdiv.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    lines = [json.dumps({"problem": problem.upper()}) for problem in leaked[:2]]
    lines.append(json.dumps({"problem": leaked[2] + " Explain how you found it."}))
    train.write_text("\n".join([*own, *lines]) + "\n", encoding="utf-8")
    other = str(shared_data / "benchmarks" / "aime24.jsonl")
    assert cli.main(["decontaminate", str(train), str(bench), other, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["train_rows"] == 303
    assert made["overlapping_rows"] == 3
    assert made["by_benchmark"]["gsm8k"] == {
        "benchmark_rows": 1319,
        "rows": 3,
        "exact": 2,
        "ngram": 1,
        "benchmark_ngram": 0,
        "contains": 0,
    }
    assert made["by_benchmark"]["aime24"]["rows"] == 0
    assert [e["train_row"] for e in made["examples"]] == [301, 302, 303]
    assert [e["benchmark_row"] for e in made["examples"]] == [6, 7, 8]
    assert cli.main(["decontaminate", str(train), str(bench)]) == 0
    assert "3 of 303 training rows overlap" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("train", "bench", "kinds"),
    [("gsm8k", "gsm8k", ["ngram", "ngram"]), ("asdiv", "svamp", ["ngram"])],
)
def test_real_training_files_share_little_with_benchmarks(
    train: str, bench: str, kinds: list[str], shared_data: Path
) -> None:
    problems = read_problems(shared_data / "train" / f"{train}.jsonl")
    benchmarks = {
        path.stem: read_problems(path) for path in sorted((shared_data / "benchmarks").iterdir())
    }
    found = find_overlaps(problems, benchmarks, ngram=13, fraction=0.5)
    told = {name: [m.kind for m in matches.values()] for name, matches in found.items() if matches}
    assert told == {bench: kinds}


def test_real_problems_are_found_within_longer_rows(shared_data: Path) -> None:
    """All but those of fewer than five words, which a list of nothing else counts."""
    bench = read_problems(shared_data / "benchmarks" / "math500.jsonl")
    rows = [
        f"{' '.join(f'filler{i}x{j}' for j in range(80))} {problem} Explain your answer."
        for i, problem in enumerate(bench)
    ]
    found = find_overlaps(rows, {"math500": bench}, ngram=13, fraction=0.5)["math500"]
    missed = [problem for i, problem in enumerate(bench) if i not in found]
    assert len(found) == 493
    assert all(len(normalise(problem).split()) < 7 for problem in missed)
    assert {i: m.benchmark_row for i, m in found.items()} == {i: i for i in found}


def test_overlap_command_on_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "good.jsonl"
    good.write_text('{"problem": "p"}\n')
    header, table = tmp_path / "header.csv", tmp_path / "none.parquet"
    header.write_text("problem,answer\n")
    pq.write_table(pa.table({"problem": pa.array([], pa.string())}), table)
    for arguments, sentence in (
        ([str(good), str(header)], "header.csv: no rows"),
        ([str(header), str(good)], "header.csv: no rows"),
        ([str(good), str(good), str(table)], "none.parquet: no rows"),
        ([str(table), str(good)], "none.parquet: no rows"),
        (["none.jsonl", str(good)], "none.jsonl: no such file"),
        ([str(good), str(good), "--ngram", "0"], "--ngram 0: give a number"),
        ([str(good), str(good), "--fraction", "2"], "--fraction 2.0: give a fraction"),
        ([str(good), str(good), "--column", "q"], "no column q; it has problem"),
    ):
        assert cli.main(["decontaminate", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert sentence in captured.err
        assert captured.err.count("\n") == 1
