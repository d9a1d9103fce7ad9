"""What is asked of a model: the held-out split, or a benchmark's list of problems."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from entrograd.data import sources
from entrograd.data.params import PromptFormat
from entrograd.data.prompt import render
from entrograd.errors import InputError
from entrograd.evaluate.params import HELDOUT, Benchmark, EvaluateParams
from entrograd.rollout.params import Sampling
from entrograd.storage.hashing import text_hash
from entrograd.storage.tables import read_table


@dataclass(frozen=True)
class Problem:
    """One problem; `prompt` holds prompt_id, messages and prompt_text as the prompts table does."""

    problem_id: str
    problem: str
    answers: tuple[str, ...]
    prompt: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A list of problems and how completions of them are drawn, `n` each. `prompt` made the
    problems' prompts; None where they came ready from the prompts table."""

    name: str
    problems: tuple[Problem, ...]
    n: int
    sampling: Sampling
    list_sha256: str
    prompt: PromptFormat | None = None

    @property
    def completions(self) -> int:
        """How many completions one model is asked for."""
        return len(self.problems) * self.n


def list_hash(problems: Sequence[tuple[str, Sequence[str]]]) -> str:
    """The sha256 of a list of (problem, accepted answers): equal for the same list in the same
    order, whatever file it came from."""
    return text_hash(*(json.dumps([text, list(answers)]) for text, answers in problems))


def grader_version() -> str:
    """Who grades, with the version that decides what is equal."""
    return f"math-verify {version('math-verify')}"


def heldout(path: Path, section: EvaluateParams) -> Task:
    """The first `heldout_problems` rows of the prompts table with split heldout, greedy.

    InputError where the table has fewer (or, where null, none).
    """
    rows = [row for row in read_table(path, "prompts").to_pylist() if row["split"] == HELDOUT]
    wanted = section.heldout_problems
    if len(rows) < (wanted or 1):
        raise InputError(
            f"{path}: {len(rows)} rows with split {HELDOUT}, {wanted or 'at least 1'} wanted; "
            "raise prepare.heldout_fraction, lower evaluate.heldout_problems, or give --prompts '' "
            "to evaluate benchmarks alone"
        )
    problems = tuple(
        Problem(row["prompt_id"], row["problem"], tuple(row["answers"]), row)
        for row in rows[:wanted]
    )
    _check_distinct(problems, path)
    sampling = Sampling(temperature=0.0, max_new_tokens=section.max_new_tokens, stop=section.stop)
    return Task(HELDOUT, problems, 1, sampling, _hash(problems))


def benchmark_task(benchmark: Benchmark) -> Task:
    """A benchmark's problems, every row of its source or its `limit`.

    InputError where a row is malformed (a score over part of a list is another list's score), where
    the list is not the one `sha256` pins, or where the name is taken.
    """
    where = f"evaluate.benchmarks: {benchmark.name}"
    if benchmark.name == HELDOUT:
        raise InputError(f"{where}: the name is that of the held-out split; choose another")
    rows, rejects = sources.read(benchmark.source)
    if rejects:
        first = rejects[0]
        raise InputError(
            f"{where}: {sources.place(first)}: {first.reason} ({len(rejects)} such rows); "
            "mend them, or name the right columns in source"
        )
    problems = []
    for index, row in enumerate(rows):
        name = f"{benchmark.name}-{index:05d}"
        prompt = {"prompt_id": name, **render(row.problem, benchmark.prompt)}
        problems.append(Problem(name, row.problem, row.answers, prompt))
    found = _hash(problems)
    if benchmark.sha256 not in (None, found):
        raise InputError(
            f"{where}: the list's content hash is {found}, sha256 pins {benchmark.sha256}: other "
            "problems, answers or order; restore the list, or pin the new one"
        )
    return Task(
        benchmark.name, tuple(problems), benchmark.n, benchmark.sampling, found, benchmark.prompt
    )


def _hash(problems: Sequence[Problem]) -> str:
    return list_hash([(problem.problem, problem.answers) for problem in problems])


def _check_distinct(problems: Sequence[Problem], path: Path) -> None:
    seen: set[str] = set()
    for problem in problems:
        if problem.problem_id in seen:
            raise InputError(
                f"{path}: prompt_id {problem.problem_id} appears twice; ids must differ"
            )
        seen.add(problem.problem_id)
