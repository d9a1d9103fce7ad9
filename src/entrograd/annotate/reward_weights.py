"""What ENCORE knows of each reward head: the entropy of its ratings over the annotated data set,
computed once and stored, so that offline and online training weigh the heads alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from entrograd.errors import InputError
from entrograd.numerics.ratings import rating_entropy, weights
from entrograd.storage.files import read_json

# ENCORE's own (arXiv 2503.20995), for weights to look at: stage annotate knows no method. Training
# weighs the same entropies by method.encore's tau and log_base.
TAU, LOG_BASE = 2.0, math.e


class HeadSummary(TypedDict):
    """What results/reward_heads.json says of a head."""

    mean: float
    entropy: float  # nats
    weight: float
    ratings: dict[str, float]  # the fraction of completions at each rating


class HeadsSummary(TypedDict):
    """The numbers of results/reward_heads.json."""

    completions: int
    tau: float
    log_base: float
    heads: dict[str, HeadSummary]


def head_values(rows: Sequence[Mapping[str, Any]], where: str) -> dict[str, Tensor]:
    """[N] ratings of each head over rows of schema `annotated`, by name, float64; {} without heads.

    InputError names the first row whose heads are not those of the first row.
    """
    found = [row["reward_heads"] or () for row in rows]
    names = [head["name"] for head in found[0]]
    for row, heads in zip(rows, found, strict=True):
        if [head["name"] for head in heads] != names:
            raise InputError(
                f"{where}: prompt {row['prompt_id']} sample {row['sample_index']} has the reward "
                f"heads {[head['name'] for head in heads]}, the first row {names}; annotate all "
                "rollouts with the same ones"
            )
    return {
        name: torch.tensor([heads[k]["value"] for heads in found], dtype=torch.float64)
        for k, name in enumerate(names)
    }


def summarise_heads(shards: Iterable[Sequence[Mapping[str, Any]]]) -> HeadsSummary:
    """The numbers of results/reward_heads.json: for each head the fraction of completions at each
    rating, their mean, their entropy (nats) and ENCORE's weight at the `tau` and `log_base` named.

    `shards`: rows of schema `annotated`, some at a time; of each one number per head is kept.
    """
    completions = 0
    parts: list[dict[str, Tensor]] = []
    for rows in shards:
        parts.append(head_values(rows, "annotated"))
        completions += len(rows)
        if list(parts[-1]) != list(parts[0]):
            raise InputError(
                f"annotated: prompt {rows[0]['prompt_id']} has the reward heads {list(parts[-1])}, "
                f"the first row {list(parts[0])}; annotate all rollouts with the same ones"
            )
    ratings = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    entropies = [float(rating_entropy(column)) for column in ratings.values()]
    weight = weights(torch.tensor(entropies), TAU).tolist()
    return {
        "completions": completions,
        "tau": TAU,
        "log_base": LOG_BASE,
        "heads": {
            name: {
                "mean": float(column.mean()),
                "entropy": entropies[k],
                "weight": weight[k],
                "ratings": _fractions(column),
            }
            for k, (name, column) in enumerate(ratings.items())
        },
    }


def read_entropies(path: Path, completions: int | None = None) -> dict[str, float]:
    """H_k (nats) by head from a file that `summarise_heads` made, of so many completions."""
    data = read_json(path)
    try:
        entropies = {name: float(head["entropy"]) for name, head in data["heads"].items()}
        counted = int(data["completions"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: not the reward heads that stage annotate writes") from None
    if completions is not None and counted != completions:
        raise InputError(
            f"{path}: measured on {counted} completions, the table has {completions}; give the "
            "file of that table, or '' to have its ratings measured"
        )
    return entropies


def head_entropies(
    ratings: Mapping[str, Tensor], path: Path | None, completions: int
) -> dict[str, float]:
    """H_k (nats) by head as stored in `path`, or of the `ratings` where there is no file."""
    if path is not None:
        return read_entropies(path, completions)
    return {name: float(rating_entropy(column)) for name, column in ratings.items()}


def _fractions(ratings: Tensor) -> dict[str, float]:
    values, counts = torch.unique(ratings, return_counts=True)
    fractions = counts.double() / len(ratings)
    return {f"{v:g}": s for v, s in zip(values.tolist(), fractions.tolist(), strict=True)}
