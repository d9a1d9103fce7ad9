"""`entrograd grade`: rows in, the same rows with their grades out."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from entrograd.cli import main as cli
from entrograd.errors import InputError
from entrograd.rewards.params import GraderParams
from entrograd.rewards.verify.grade import Grader, Item
from entrograd.rewards.verify.rows import grade_file
from helpers.paths import SHIPPED


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(GraderParams(workers=1)) as opened:
        yield opened


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_command_adds_grades_to_the_same_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [
        {"problem": "p", "answer": "x+1", "completions": ["\\boxed{1+x}", "it is 7", ""], "k": [1]},
        {"problem": "q", "answer": ["2", 3], "completion": "So 3"},
        {"answer": 4, "completion": "hmm\ud800", "finish_reason": "length"},
        {"answer": "4", "completions": []},
    ]
    assert cli.main(["grade", str(write(tmp_path / "f.jsonl", *rows))]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ("reward", "extracted", "reward_status", "extraction_rule")
    expected = [
        ([1.0, 0.0, 0.0], ["1+x", "7", None], ["ok", "ok", "no_answer"], ["boxed", "last", None]),
        (1.0, "3", "ok", "last"),
        (0.0, None, "truncated", None),
        ([], [], [], []),
    ]
    assert printed == [
        row | dict(zip(names, grade, strict=True))
        for row, grade in zip(rows, expected, strict=True)
    ]


def test_the_order_of_rules_is_a_parameter(tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", {"answer": "5", "completion": "\\boxed{5} is not 6"})
    for rules, expected in (
        (["boxed", "last"], (1.0, "5", "boxed")),
        (["last", "boxed"], (0.0, "6", "last")),
        (["anchor"], (0.0, None, None)),
    ):
        with Grader(GraderParams.model_validate({"extraction": rules})) as chosen:
            (row,) = grade_file(file, chosen)
        assert (row["reward"], row["extracted"], row["extraction_rule"]) == expected


def test_the_rules_of_params_are_the_rules_there_are() -> None:
    from entrograd.rewards.verify.extract import RULES

    assert GraderParams().extraction == list(RULES)


def test_the_command_reads_the_grader_of_a_params_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = SHIPPED.read_text()
    chosen = tmp_path / "params.yaml"
    chosen.write_text(text.replace("  grader:\n", "  grader:\n    extraction: [last]\n", 1))
    file = write(tmp_path / "f.jsonl", {"answer": "5", "completion": "\\boxed{5} is not 6"})
    assert cli.main(["grade", str(file), "--params", str(chosen)]) == 0
    assert json.loads(capsys.readouterr().out)["extracted"] == "6"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"completion": "1"}', "line 2: missing answer"),
        ('{"answer": [], "completion": "1"}', "line 2: missing answer"),
        ('{"answer": "1"}', "line 2: give either completion"),
        ('{"answer": "1", "completion": "1", "completions": []}', "line 2: give either"),
        ('{"answer": "1", "completion": 1}', "line 2: completion is not a string"),
        ('{"answer": "1", "completions": "1"}', "line 2: completions are not a list of strings"),
        ('{"answer": "1", "completions": ["1"], "finish_reason": "stop"}', "one per completion"),
    ],
)
def test_a_line_that_cannot_be_graded_is_named(
    grader: Grader, tmp_path: Path, line: str, said: str
) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text('{"answer": "1", "completion": "1"}\n' + line + "\n")
    with pytest.raises(InputError, match=f": .*{said}"):
        list(grade_file(file, grader))


def test_an_absent_file_is_named(grader: Grader, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read"):
        next(grade_file(tmp_path / "none.jsonl", grader))


def test_memory_does_not_grow_with_the_file(grader: Grader, tmp_path: Path) -> None:
    def peak(count: int) -> int:
        file = tmp_path / "f.jsonl"
        with file.open("w") as out:
            for i in range(count):
                row = {"answer": str(i), "completion": "x" * 200 + f" \\boxed{{{i}}}"}
                out.write(json.dumps(row) + "\n")
        tracemalloc.start()
        try:
            assert all(row["reward"] == 1.0 for row in grade_file(file, grader))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # The caches are full after 5,000 rows; what is left is when Python collects its cycles. A row
    # that is kept, or only its answer, takes more than 50 bytes.
    small, large = peak(5_000), peak(35_000)
    assert large - small < 20 * 30_000


def test_remembered_pairs_are_bounded(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entrograd.rewards.verify.grade._REMEMBERED", 3)
    items = [Item((f"x+{i}",), f"\\boxed{{{i}+x}}", "stop") for i in range(6)]
    assert [grade.reward for grade in grader.grade(items)] == [1.0] * 6
    assert len(grader._remembered) == 3
    assert [grade.reward for grade in grader.grade(items)] == [1.0] * 6


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path) -> None:
    rows = [{"answer": "1", "completion": "1" * 100}] * 5000
    file = write(tmp_path / "f.jsonl", *rows)
    command = f"{sys.executable} -m entrograd.cli.main grade {file} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["reward"] == 0.0
    assert done.stderr == ""
