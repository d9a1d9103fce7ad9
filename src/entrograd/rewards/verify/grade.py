"""Rewards: 1 if a final answer is one of the accepted ones, else 0, and how comparing it ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from types import TracebackType

from entrograd.errors import InputError
from entrograd.rewards.params import GraderParams
from entrograd.rewards.sandbox import HardLimitPool, Outcome, WorkerStartError
from entrograd.rewards.verify import worker
from entrograd.rewards.verify.equivalence import Canonical, canonical, settle
from entrograd.rewards.verify.extract import Extraction, extract

STATUSES = ("ok", "no_answer", "timeout", "truncated", "error")

_REMEMBERED = 1 << 14  # compared pairs

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

    def __init__(self, limits: GraderParams) -> None:
        self._rules = limits.extraction
        self._pool = HardLimitPool(
            worker.__name__, limits.workers, limits.timeout_seconds, limits.memory_mb
        )
        self._remembered: dict[_Pair, Outcome] = {}

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
        """One grade per item, in order. InputError if an item has no accepted answer."""
        for index, item in enumerate(items):
            if not item.answers:
                raise InputError(f"item {index}: no accepted answer to grade against")
        extractions = [final_answer(item, self._rules) for item in items]
        outcomes = iter(
            self.compare(
                [
                    (item.answers, extraction.answer)
                    for item, extraction in zip(items, extractions, strict=True)
                    if extraction is not None
                ]
            )
        )
        return [
            _ungraded(item) if extraction is None else _grade(extraction, next(outcomes))
            for item, extraction in zip(items, extractions, strict=True)
        ]

    def compare(self, questions: Sequence[tuple[Sequence[str], str]]) -> list[Outcome]:
        """Whether each answer is one of its accepted ones: (accepted answers, answer) -> an
        outcome, `done` with True or False, `timeout` or `error` if that stays unknown."""
        keys = [(tuple(accepted), answer) for accepted, answer in questions]
        verdicts = {
            (accepted, answer): [_verdict(canonical(gold), canonical(answer)) for gold in accepted]
            for accepted, answer in dict.fromkeys(keys)
        }
        compared = self._symbolic(
            dict.fromkeys(
                verdict
                for row in verdicts.values()
                if True not in row  # an open pair cannot change it
                for verdict in row
                if isinstance(verdict, tuple)
            )
        )
        outcomes = {
            key: Outcome("done", True)
            if True in row
            else _any(compared[v] if isinstance(v, tuple) else v for v in row)
            for key, row in verdicts.items()
        }
        return [outcomes[key] for key in keys]

    def _symbolic(self, pairs: Iterable[_Pair]) -> dict[_Pair, Outcome]:
        """The outcome of each pair, by the worker processes unless it is remembered."""
        outcomes = {pair: self._remembered[pair] for pair in pairs if pair in self._remembered}
        new = [pair for pair in pairs if pair not in outcomes]
        try:
            compared = self._pool.map(new)
        except WorkerStartError as error:
            raise InputError(
                f"grader: {error}; repair the installation of math-verify (make setup)"
            ) from None
        fresh = dict(zip(new, compared, strict=True))
        self._remembered.update(fresh)
        for pair in list(islice(self._remembered, max(0, len(self._remembered) - _REMEMBERED))):
            del self._remembered[pair]
        return outcomes | fresh


def final_answer(item: Item, rules: Sequence[str] | None = None) -> Extraction | None:
    """The extracted answer; an unfinished line of words (rule `line`) is none."""
    extraction = extract(item.completion_text, rules)
    if extraction and extraction.rule == "line" and item.finish_reason == "length":
        return None
    return extraction


def _verdict(gold: Canonical, answer: Canonical) -> bool | _Pair:
    settled = settle(gold, answer)
    return (gold.latex, answer.latex) if settled is None else settled


def _any(verdicts: Iterable[bool | Outcome]) -> Outcome:
    outcomes = [v if isinstance(v, Outcome) else Outcome("done", v) for v in verdicts]
    if any(outcome.value is True for outcome in outcomes):
        return Outcome("done", True)
    unknown = {outcome.kind: outcome for outcome in outcomes if outcome.kind != "done"}
    return unknown.get("timeout") or unknown.get("error") or Outcome("done", False)


def _grade(extraction: Extraction, outcome: Outcome) -> Grade:
    status = "ok" if outcome.kind == "done" else outcome.kind
    return Grade(float(outcome.value is True), status, *extraction)


def _ungraded(item: Item) -> Grade:
    return Grade(0.0, "truncated" if item.finish_reason == "length" else "no_answer", None)
