"""Hostile answers: no hang, no crash, no code run, bounded work a row.

`make fuzz` draws FUZZ=12000 of them; a test run a few hundred.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from entrograd.rewards.params import GraderParams
from entrograd.rewards.verify.equivalence import canonical
from entrograd.rewards.verify.extract import extract
from entrograd.rewards.verify.grade import STATUSES, Grade, Grader, Item
from helpers.hostile import hostile

COUNT = int(os.environ.get("FUZZ", "200"))
LIMIT = GraderParams(workers=2, timeout_seconds=0.2, memory_mb=1024)
GOLDS = (
    *(r"\frac{\pi}{2}", "x^2+1", r"[0, \infty)", r"\{7, 11\}", "(3, -4)", "east", "31.7 km", "A"),
    *(r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "y = 3x - 8", "x < 13", r"17\%", "-52"),
)
BATCH = 100


@pytest.mark.timeout(3600)
def test_hostile_answers_cost_only_their_own_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each row is graded, the rewards are 0, an honest row behind each batch is still right, and
    nothing appears in the working folder. What this process itself does for a row (extraction and
    canonical form, under no limit) takes less than a second of its processor time."""
    monkeypatch.chdir(tmp_path)
    drawn = hostile(COUNT, seed=COUNT)
    statuses: Counter[tuple[str, str]] = Counter()
    slowest, longest, started = 0.0, 0.0, time.monotonic()
    with Grader(LIMIT) as grader:
        while rows := list(islice(drawn, BATCH)):
            for kind, text in rows:
                before = time.process_time()
                found = extract(text)
                canonical.__wrapped__(found.answer) if found else None
                spent = time.process_time() - before
                assert spent < 1, (kind, text[:100], spent)
                slowest = max(slowest, spent)
            items = [Item((GOLDS[i % len(GOLDS)],), t, "stop") for i, (_, t) in enumerate(rows)]
            before = time.monotonic()
            *grades, honest = grader.grade([*items, Item(("x^2+1",), r"\boxed{1+x^2}", "stop")])
            longest = max(longest, (time.monotonic() - before) / len(rows))
            assert honest == Grade(1.0, "ok", "1+x^2", "boxed")
            for (kind, text), grade in zip(rows, grades, strict=True):
                assert grade.status in STATUSES
                assert grade.reward == 0, (kind, text[:200], grade)
                statuses[kind, grade.status] += 1
    assert sum(statuses.values()) == COUNT
    assert {"timeout", "no_answer", "ok"} <= {status for _, status in statuses}
    assert list(tmp_path.iterdir()) == []
    with capsys.disabled():
        if "FUZZ" in os.environ:
            print(f"\n{COUNT} hostile answers in {time.monotonic() - started:.0f} s")
            print(f"seconds per row: slowest here {slowest:.3f}, batch mean at most {longest:.3f}")
            for (kind, status), number in sorted(statuses.items()):
                print(f"  {kind:24}{status:12}{number:6}")
