"""Which completions the page shows side by side, and whose weights wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from entrograd.storage.tables import provenance, read_batches, shard_files

# What became of a problem: whether the first model and the last have it right.
KINDS = {
    "fixed": (False, True),
    "broken": (True, False),
    "still wrong": (False, False),
    "right throughout": (True, True),
}
ROWS = 1024  # of a samples table that are read together


@dataclass(frozen=True)
class Comparison:
    """One problem with each model's first completion; `rows` are rows of a samples table."""

    kind: str
    problem: str
    answers: list[str]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Comparisons:
    """What became of the problems of a benchmark that all of `models` answered: how many there are
    of each kind, and some to show."""

    benchmark: str
    models: list[str]
    counts: dict[str, int]
    shown: list[Comparison]


def compare(path: Path, order: Sequence[str], count: int) -> Comparisons:
    """The models, in this order, on the held-out problems or else on the first benchmark, with
    `count` problems to show. Of other problems only ids and rewards are read into memory."""
    columns = ("model", "benchmark", "problem_id", "sample_index", "reward")
    parts = list(read_batches(path, "samples", ROWS, columns))
    if not parts:
        return Comparisons("", [], dict.fromkeys(KINDS, 0), [])
    table = pa.concat_tables(parts)
    names = table["benchmark"].unique().to_pylist()
    benchmark = "heldout" if "heldout" in names else names[0]
    table = table.filter(pc.equal(table["benchmark"], benchmark))
    present = table["model"].unique().to_pylist()
    models = [name for name in order if name in present] or present
    problems = kinds(table.filter(pc.equal(table["sample_index"], 0)), models)
    chosen = choose(problems, count)
    wanted = pa.array([problem_id for _, problem_id in chosen], pa.string())
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for part in read_batches(path, "samples", ROWS):
        for row in part.filter(pc.is_in(part["problem_id"], wanted)).to_pylist():
            if row["benchmark"] == benchmark and row["sample_index"] == 0:
                found.setdefault(row["problem_id"], {})[row["model"]] = row
    shown = []
    for kind, problem_id in chosen:
        rows = [found[problem_id][model] for model in models]
        shown.append(Comparison(kind, rows[0]["problem"], rows[0]["answers"], rows))
    return Comparisons(benchmark, models, {kind: len(problems[kind]) for kind in KINDS}, shown)


def kinds(table: pa.Table, models: Sequence[str]) -> dict[str, pa.Array]:
    """The ids of the problems of each kind, in table order, of those that all of `models` answered.
    The table has one completion per model and problem; of several the last counts."""
    problems = table["problem_id"].combine_chunks().dictionary_encode()
    indices, rewards = problems.indices.to_numpy(), table["reward"].to_numpy()
    right = np.full((len(models), len(problems.dictionary)), -1, np.int8)  # -1: not answered
    for row, model in enumerate(models):
        own = pc.equal(table["model"], model).to_numpy()
        right[row, indices[own]] = rewards[own] >= 1
    answered = (right >= 0).all(0)
    return {
        kind: problems.dictionary.filter(
            pa.array(answered & (right[0] == before) & (right[-1] == after))
        )
        for kind, (before, after) in KINDS.items()
    }


def choose(problems: Mapping[str, pa.Array], count: int) -> list[tuple[str, str]]:
    """Kind and id of `count` problems to show: of every twelve, five fixed, three broken, three
    still wrong and one right throughout; where a kind runs short the others fill up, in that
    order."""
    turns = ("fixed", "broken", "still wrong") * 3 + ("fixed", "fixed", "right throughout")
    taken = dict.fromkeys(KINDS, 0)
    while sum(taken.values()) < min(count, sum(map(len, problems.values()))):
        for kind in turns:
            if sum(taken.values()) < count and taken[kind] < len(problems[kind]):
                taken[kind] += 1
    return [(kind, id_) for kind in KINDS for id_ in problems[kind][: taken[kind]].to_pylist()]


def weights(path: Path) -> dict[str, str]:
    """The hash of each model's weights, as far as the files of samples tell."""
    origins = [provenance(file) for file in (shard_files(path) if path.is_dir() else [path])]
    return {
        o["model"]: o["policy_version"] for o in origins if {"model", "policy_version"} <= set(o)
    }
