"""Real accepted answers against those of other problems: none is taken for another.

A test run tries a few others of each; `make fuzz` a hundred (AGAINST=100).
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from entrograd.rewards.params import GraderParams
from entrograd.rewards.verify.grade import Grader

AGAINST = int(os.environ.get("AGAINST", "2"))
SUITE = ("aime24", "amc23", "math500", "minerva", "olympiadbench")

# Answers that are equal though no exact reading of their plain text says so, and why. Each pair
# stands for both orders.
EXPLAINED = {
    frozenset({"8", r"$8 \%$"}): "a number may leave out its percent sign",
    frozenset({"1950", r"1950^\circ C"}): "a number may leave out its unit",
    frozenset({r"4.4677 \times 10^{14}", r"4.4677 \times 10^{14} Hz"}): "the same",
    frozenset({"204", "204_5"}): "a number may leave out its base",
    frozenset({"40", "40_9"}): "the same",
}


def answers(data: Path) -> list[tuple[str, tuple[str, ...]]]:
    """(id, accepted answers) of every problem of the five benchmarks."""
    found = []
    for name in SUITE:
        with (data / "benchmarks" / f"{name}.jsonl").open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                given = row["answer"]
                found.append((row["id"], tuple(given) if isinstance(given, list) else (given,)))
    return found


def exact(text: str) -> Fraction | str:
    """An answer read by other means than the grader's: markup, units and names taken off, then a
    fraction, or what is left of the text."""
    for pattern in (
        r"\\?\$|\\left|\\right|\\[,;!]|\s",
        r"\^\{?\\circ\}?|\\degree",
        r"(?<=[0-9])\\(?:text|mathrm|mbox)\{.*",
        r"^[a-z](?:\([a-z]\))?=",
    ):
        text = re.sub(pattern, "", text)
    text = re.sub(r"([_^])\{(\w)\}(?!\w)", r"\1\2", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\1/\2", re.sub(r"\\times10\^\{?(-?\d+)\}?", r"e\1", text))
    text = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text).replace("{,}", "")
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+", text):
        text = text.replace(",", "")
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return text


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(GraderParams()) as opened:
        yield opened


@pytest.mark.timeout(3600)
def test_no_answer_is_taken_for_that_of_another_problem(grader: Grader, shared_data: Path) -> None:
    problems = answers(shared_data)
    rng = random.Random(AGAINST)
    questions, names = [], []
    for name, accepted in problems:
        others = [other for other in rng.sample(problems, AGAINST + 1) if other[0] != name]
        for other, texts in others[:AGAINST]:
            questions += [(accepted, text) for text in texts]
            names += [(name, other)] * len(texts)
    outcomes = grader.compare(questions)
    wrong, unsure = [], 0
    for (accepted, text), outcome, pair in zip(questions, outcomes, names, strict=True):
        unsure += outcome.kind != "done"
        equal = any(
            exact(gold) == exact(text) or frozenset({gold, text}) in EXPLAINED for gold in accepted
        )
        if outcome.value is True and not equal:
            wrong.append((*pair, accepted, text))
    assert len(problems) == 1560
    assert wrong == []
    assert unsure <= len(questions) // 1000


def test_the_exact_reading_tells_answers_apart() -> None:
    assert exact(r"$\frac{1}{2}$") == exact("0.5") == Fraction(1, 2)
    assert exact("10{,}000") == exact("10,000") == exact("$f(x)=10000$") == 10000
    assert exact(r"4^{\circ}") == exact(r"4 \text{ cm}") == 4
    assert exact("x+1") != exact("x-1")
    assert exact("2") != exact(r"2 \%")
    assert exact(r"\omega^{2}") == exact(r"\omega^2") != exact(r"\omega^{2}1")
