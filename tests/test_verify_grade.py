"""Grading: statuses, limits, real data, and answers meant to hang or break the grader."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from entrograd.errors import InputError
from entrograd.rewards.params import GraderParams
from entrograd.rewards.sandbox import HardLimitPool, WorkerStartError
from entrograd.rewards.verify.grade import Grade, Grader, Item
from helpers.paths import ROOT

TOWER = r"\boxed{\sum_{n=1}^{100000} n^{n}}"


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(GraderParams(workers=1, timeout_seconds=1.0)) as opened:
        yield opened


def box(gold: str | tuple[str, ...], answer: str) -> Item:
    golds = (gold,) if isinstance(gold, str) else gold
    return Item(golds, f"\\boxed{{{answer}}}", "stop")


def test_every_status_but_error(grader: Grader) -> None:
    grades = grader.grade(
        [
            Item(("12",), "12\n", "stop"),
            Item(("12",), "13\n", "stop"),
            Item(("12",), "", "stop"),
            Item(("12",), "so I think that", "length"),
            Item(("12",), "is it 12 or", "length"),
            Item(("x^2+1",), TOWER, "stop"),
            Item(("x^2+1",), r"\boxed{1+x^2}", "stop"),
        ]
    )
    assert [(g.reward, g.status, g.answer) for g in grades] == [
        (1.0, "ok", "12"),
        (0.0, "ok", "13"),
        (0.0, "no_answer", None),
        (0.0, "truncated", None),
        (1.0, "ok", "12"),
        (0.0, "timeout", TOWER[7:-1]),
        (1.0, "ok", "1+x^2"),
    ]
    assert grades[0].rule == "leading"


@pytest.mark.parametrize(
    ("gold", "answer", "reward"),
    [
        (r"\sqrt{4}", "2", 1),
        ("1/3", "0.333333", 1),
        ("50%", "0.5", 1),
        ("4t", "4", 0),  # t is an unknown, not a unit
        ("4t", "4 t", 1),
        (r"\{1,2\}", "2, 1", 1),
        ("garbage 5", "5", 0),  # no number is taken out of the middle of an answer
        (("7", r"\frac{\pi}{2}"), r"\frac{2\pi}{4}", 1),  # any accepted answer
        (("7", "8"), "8", 1),
        ("x<5", "x>5", 0),
    ],
)
def test_equivalence(
    grader: Grader, gold: str | tuple[str, ...], answer: str, reward: float
) -> None:
    assert grader.grade([box(gold, answer)]) == [Grade(reward, "ok", answer, "boxed")]


def test_a_repeated_pair_is_compared_once(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    real: Callable[..., object] = grader._pool.map

    def spy(pairs: list[object]) -> object:
        seen.extend(pairs)
        return real(pairs)

    monkeypatch.setattr(grader._pool, "map", spy)
    items = [box("y+2", "2+y")] * 3
    assert [g.reward for g in grader.grade(items) + grader.grade(items)] == [1.0] * 6
    assert seen == [("y+2", "2+y")]


def test_an_item_without_accepted_answers_is_refused(grader: Grader) -> None:
    with pytest.raises(InputError, match="item 1: no accepted answer"):
        grader.grade([box("1", "1"), Item((), "1", "stop")])


def test_plain_answers_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with Grader(GraderParams()) as lazy:
        assert lazy.grade([box("12", "12"), box("12", "x = 13")])[0].reward == 1.0


def test_the_worker_imports_no_torch() -> None:
    code = (
        "import sys, entrograd.rewards.verify.worker, math_verify;"
        "print([m for m in ('torch', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- the pool, with a worker whose behaviour is known ----------------------------------------

WORKER = """
import os, sys, time
from entrograd.rewards.sandbox_worker import serve

counted = []

def handle(request):
    if request == "hang":
        while True: pass
    if request == "die": os._exit(3)
    if request == "raise": raise KeyError(request)
    if request == "eat": return len(bytearray(10 << 30))
    if request == "print": print("noise")
    if request == "count": counted.append(1)
    if request == "count": assert len(counted) < 2
    return request

serve(handle, lambda: None)
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HardLimitPool]:
    (tmp_path / "hardlimitworker.py").write_text(WORKER)
    (tmp_path / "brokenworker.py").write_text("raise SystemExit('no such grammar')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with HardLimitPool("hardlimitworker", 2, 0.2, 1024) as opened:
        yield opened


def test_limits_cost_only_their_own_row(pool: HardLimitPool) -> None:
    requests = ["a", "hang", "b", "die", "raise", "eat", "print", "\ud800\x00", "x" * 20_000] * 4
    outcomes = pool.map(requests)
    expected = {
        "hang": ("timeout", None),
        "die": ("error", "Died"),
        "raise": ("error", "KeyError"),
        "eat": ("error", "MemoryError"),
    }
    assert [(o.kind, o.value) for o in outcomes] == [
        expected.get(request, ("done", request)) for request in requests
    ]


def test_what_a_request_left_behind_does_not_decide_the_next(pool: HardLimitPool) -> None:
    assert [o.kind for o in pool.map(["count"] * 4 + ["a"])] == ["done"] * 5


def test_a_worker_that_died_between_calls_is_replaced(pool: HardLimitPool) -> None:
    assert pool.map(["a"])[0].value == "a"
    pool._workers[0].process.kill()
    assert pool.map(["b"])[0].value == "b"


def test_closing_ends_the_processes(pool: HardLimitPool) -> None:
    pool.map(["a"] * 40)
    pids = [worker.process.pid for worker in pool._workers]
    assert len(pids) == 2
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_that_cannot_start_says_why(pool: HardLimitPool) -> None:
    pool.module = "brokenworker"
    with pytest.raises(WorkerStartError, match="no such grammar"):
        pool.map(["a"])


# --- hostile answers -------------------------------------------------------------------------


def hostile(count: int) -> list[str]:
    """Answers of many kinds; those that really exhaust a limit are few, for time's sake."""
    rng = random.Random(0)
    soup = "\\{}[]()^_$&%#~ 0x9!.,=<>|"
    cheap: list[Callable[[], str]] = [
        lambda: "{" * rng.randint(1, 30) + "1" + "}" * rng.randint(1, 900),
        lambda: "\\frac{" * rng.randint(1, 20) + "1",
        lambda: "1" * rng.choice([300, 500, 1900, 1_000_000]),
        lambda: "0." + "3" * rng.choice([300, 500, 1900]),
        lambda: "5\x00\u202e\u2066 6\u2069" * rng.randint(1, 5),
        lambda: "__import__('os').system('touch pwned')",
        lambda: "().__class__.__bases__[0].__subclasses__()",
        lambda: "\ud800" * rng.randint(1, 9),
        lambda: "".join(chr(rng.randint(0, 0x2FFF)) for _ in range(rng.randint(1, 200))),
        lambda: "".join(rng.choice(soup) for _ in range(rng.randint(1, 100))),
        lambda: rng.choice(["nan", "inf", "zoo", "None", "1/0", "\\frac{1}{0}", "0^0", "-", "i"]),
        lambda: "\\int_{0}^{1} x^{" * rng.randint(1, 3),
        lambda: f"\\text{{{rng.random()}}}",
    ]
    costly = ["9^9^9^9", "9^{9^{9^{9^{9}}}}", "10^{9999999999}", "123456789!!", "(" * 900 + "x"]
    return costly + [cheap[i % len(cheap)]() for i in range(count - len(costly))]


def test_hostile_answers_neither_hang_nor_crash_nor_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    golds = ("5", r"\frac{\pi}{2}", "x^2+1")
    forms = ("\\boxed{%s}", "The answer is %s", "%s", "$%s$")
    items = [
        Item((golds[i % 3],), forms[i % 4].replace("%s", text), "stop")
        for i, text in enumerate(hostile(250))
    ]
    items.append(Item(("x^2+1",), r"\boxed{1+x^2}", "stop"))
    with Grader(GraderParams(workers=1, timeout_seconds=0.3, memory_mb=1024)) as limited:
        grades = limited.grade(items)
    assert grades[-1] == Grade(1.0, "ok", "1+x^2", "boxed")
    assert sum(grade.reward for grade in grades[:-1]) == 0
    assert {grade.status for grade in grades} <= {"ok", "no_answer", "timeout", "error"}
    assert "timeout" in {grade.status for grade in grades}
    assert list(tmp_path.iterdir()) == []


# --- real data -------------------------------------------------------------------------------


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "name", ["aime24", "amc23", "math500", "minerva", "olympiadbench", "gsm8k", "svamp"]
)
def test_gold_answers_equal_themselves(grader: Grader, shared_data: Path, name: str) -> None:
    items = [
        box(answer, answer)
        for row in rows(shared_data / "benchmarks" / f"{name}.jsonl")
        for answer in (row["answer"] if isinstance(row["answer"], list) else [row["answer"]])
    ]
    wrong = [
        item.answers
        for item, grade in zip(items, grader.grade(items), strict=True)
        if not grade.reward
    ]
    assert wrong == []


def test_agreement_with_another_grader(grader: Grader, shared_data: Path) -> None:
    """36 x 8 completions. The one disagreement: accepted answer 10{,}000, the completion boxes
    10000; the other grader does not read {,} as a thousands separator, so it is wrong."""
    table = rows(shared_data / "rollouts" / "math_8_completions.jsonl")
    items = [Item((r["answer"],), text, "stop") for r in table for text in r["completions"]]
    verdicts = [verdict for row in table for verdict in row["graded"]]
    grades = grader.grade(items)
    assert {grade.status for grade in grades} == {"ok"}
    assert {grade.rule for grade in grades} == {"boxed"}
    disagreements = [
        (item.answers[0], grade.answer, grade.reward, verdict)
        for item, grade, verdict in zip(items, grades, verdicts, strict=True)
        if bool(grade.reward) != verdict
    ]
    assert len(items) == 288
    assert disagreements == [("10{,}000", "10000", 1.0, False)]
    listed = "| 6 | 8 | `10{,}000` | `10000` | equal | different | equal:"
    assert listed in (ROOT / "docs" / "grading.md").read_text()
    assert not verdicts[5 * 8 + 7]
    assert grades[5 * 8 + 7].reward == 1.0
