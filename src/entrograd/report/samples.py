"""Which completions the page shows side by side, and whose weights wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrograd.storage.tables import provenance, shard_files

KINDS = ("fixed", "broken", "still wrong", "right throughout")


@dataclass(frozen=True)
class Comparison:
    """One problem with each model's first completion; `rows` are rows of a samples table."""

    kind: str
    problem: str
    answers: list[str]
    rows: list[dict[str, Any]]


def compare(samples: Sequence[dict[str, Any]], models: Sequence[str]) -> list[Comparison]:
    """Every problem all of `models` answered, in table order, by what became of it between the
    first model and the last."""
    by_problem: dict[str, dict[str, dict[str, Any]]] = {}
    for row in samples:
        if row["sample_index"] == 0:
            by_problem.setdefault(row["problem_id"], {})[row["model"]] = row
    compared = []
    for found in by_problem.values():
        if any(model not in found for model in models):
            continue
        rows = [found[model] for model in models]
        before, after = rows[0]["reward"] >= 1, rows[-1]["reward"] >= 1
        kind = {
            (False, True): "fixed",
            (True, False): "broken",
            (False, False): "still wrong",
            (True, True): "right throughout",
        }[before, after]
        compared.append(Comparison(kind, rows[0]["problem"], rows[0]["answers"], rows))
    return compared


def choose(compared: Sequence[Comparison], count: int) -> list[Comparison]:
    """`count` comparisons to show: of every twelve, five fixed, three broken, three still wrong
    and one right throughout; where a kind runs short the others fill up, in that order."""
    pools = {kind: [c for c in compared if c.kind == kind] for kind in KINDS}
    turns = ("fixed", "broken", "still wrong") * 3 + ("fixed", "fixed", "right throughout")
    taken = dict.fromkeys(KINDS, 0)
    while sum(taken.values()) < min(count, len(compared)):
        for kind in turns:
            if sum(taken.values()) < count and taken[kind] < len(pools[kind]):
                taken[kind] += 1
    return [c for kind in KINDS for c in pools[kind][: taken[kind]]]


def weights(path: Path) -> dict[str, str]:
    """The hash of each model's weights, as far as the files of samples tell."""
    origins = [provenance(file) for file in (shard_files(path) if path.is_dir() else [path])]
    return {
        o["model"]: o["policy_version"] for o in origins if {"model", "policy_version"} <= set(o)
    }
