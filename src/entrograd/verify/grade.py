"""Rewards: 1 where a completion's final answer is an accepted one, else 0, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from entrograd import params
from entrograd.errors import InputError
from entrograd.executor import HardLimitPool, Outcome, WorkerStartError
from entrograd.verify.equivalence import Canonical, canonical, settle
from entrograd.verify.extract import Extraction, extract

STATUSES = ("ok", "no_answer", "timeout", "truncated", "error")

_Pair = tuple[str, str]


@dataclass(frozen=True)
class Item:
    """A completion to grade. finish_reason: stop | length."""

    answers: tuple[str, ...]
    completion_text: str
    finish_reason: str


@dataclass(frozen=True)
class Grade:
    """reward: 1.0 or 0.0. status: ok (compared), no_answer, truncated (no answer, and cut off by
    the length limit), timeout or error (the comparison was given up; reward 0). answer: the final
    answer as text. rule: the extraction rule that found it."""

    reward: float
    status: str
    answer: str | None
    rule: str | None = None


class Grader:
    """Grades completions; use as a context manager, which ends its worker processes.

    Spelling and exact arithmetic settle most pairs. The others go to worker processes under hard
    limits of time and memory; a pair compared before is not compared again.
    """

    def __init__(self, limits: params.Grader) -> None:
        self._limits = limits
        self._pool = HardLimitPool(
            "entrograd.verify.worker", limits.workers, limits.timeout_seconds, limits.memory_mb
        )
        self._known: dict[_Pair, Outcome] = {}

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.close()

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """One grade an item, in order. InputError where an item has no accepted answer."""
        for index, item in enumerate(items):
            if not item.answers:
                raise InputError(f"item {index}: no accepted answer to grade against")
        found = [final_answer(item) for item in items]
        golds: dict[str, Canonical] = {}
        verdicts: list[list[bool | _Pair]] = []
        for item, extraction in zip(items, found, strict=True):
            if extraction is None:
                verdicts.append([])
                continue
            answer = canonical(extraction.answer)
            for text in item.answers:
                golds.setdefault(text, canonical(text))
            verdicts.append([_verdict(golds[text], answer) for text in item.answers])
        self._compare(verdicts)
        return [
            self._grade(item, extraction, verdict)
            for item, extraction, verdict in zip(items, found, verdicts, strict=True)
        ]

    def _compare(self, verdicts: Sequence[Sequence[bool | _Pair]]) -> None:
        """Symbolic comparison of the open pairs that can still change a reward."""
        pairs = dict.fromkeys(
            verdict
            for row in verdicts
            if True not in row
            for verdict in row
            if isinstance(verdict, tuple) and verdict not in self._known
        )
        try:
            outcomes = self._pool.map(list(pairs))
        except WorkerStartError as error:
            raise InputError(
                f"grader: {error}; repair the installation of math-verify (make setup)"
            ) from None
        self._known.update(zip(pairs, outcomes, strict=True))

    def _grade(
        self, item: Item, extraction: Extraction | None, verdict: Sequence[bool | _Pair]
    ) -> Grade:
        if extraction is None:
            status = "truncated" if item.finish_reason == "length" else "no_answer"
            return Grade(0.0, status, None)
        if True not in verdict:
            outcomes = [self._known[pair] for pair in verdict if isinstance(pair, tuple)]
            if not any(outcome.value is True for outcome in outcomes):
                kinds = {outcome.kind for outcome in outcomes}
                status = next((kind for kind in ("timeout", "error") if kind in kinds), "ok")
                return Grade(0.0, status, *extraction)
        return Grade(1.0, "ok", *extraction)


def final_answer(item: Item) -> Extraction | None:
    """The extracted answer; an unfinished line of words (rule `line`) is none."""
    extraction = extract(item.completion_text)
    if extraction and extraction.rule == "line" and item.finish_reason == "length":
        return None
    return extraction


def _verdict(gold: Canonical, answer: Canonical) -> bool | _Pair:
    settled = settle(gold, answer)
    return (gold.latex, answer.latex) if settled is None else settled
