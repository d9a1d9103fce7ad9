"""Batches for tests of methods: written by hand, or random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from entrograd.methods.batch import (
    Batch,
)

Rows = Sequence[Sequence[float]]


def pad(rows: Rows) -> Tensor:
    """[B, T] float64, NaN at padding."""
    padded = torch.full((len(rows), max(map(len, rows))), math.nan, dtype=torch.float64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return padded


def group(rewards: Sequence[float], entropies: Rows | None = None, **columns: Any) -> Batch:
    """One group in float64; lists of lists are padded."""
    tensors = {
        name: pad(rows)
        for name, rows in columns.items()
        if name in ("old_logprobs", "ref_logprobs")
    }
    shape = (
        pad(entropies) if entropies else tensors.get("old_logprobs", torch.zeros(len(rewards), 1))
    )
    ids = columns.get("cluster_ids")
    heads = columns.get("reward_heads")
    return Batch(
        completion_mask=~shape.isnan(),
        groups=torch.zeros(len(rewards), dtype=torch.long),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        old_logprobs=tensors.get("old_logprobs", torch.zeros_like(shape).double()),
        ref_logprobs=tensors.get("ref_logprobs"),
        entropies=pad(entropies) if entropies else None,
        cluster_ids=None if ids is None else torch.tensor(ids),
        answered=columns.get("answered"),
        reward_heads=None if heads is None else torch.tensor(heads, dtype=torch.float64),
        head_names=columns.get("head_names", ()),
    )


def ragged(values: Tensor, batch: Batch) -> list[list[float]]:
    return [row[mask].tolist() for row, mask in zip(values, batch.completion_mask, strict=True)]


def assert_rows(found: Tensor, batch: Batch, expected: Rows, tolerance: float = 1e-5) -> None:
    for row, wanted in zip(ragged(found, batch), expected, strict=True):
        assert row == pytest.approx(list(wanted), abs=tolerance)


HEADS = {"encore": {"entropies": {"format": 0.4, "brevity": 1.1}}}


def make_batch(seed: int, sizes: tuple[int, ...] = (4, 1, 3, 5), longest: int = 6) -> Batch:
    """Ragged random groups, interleaved, every column filled, NaN at padding."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    groups = groups[torch.randperm(count, generator=generator)]
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    mask = torch.arange(longest) < lengths[:, None]

    def tokens(scale: float, shift: float) -> Tensor:
        values = torch.rand(count, longest, generator=generator, dtype=torch.float64)
        return (shift + scale * values).masked_fill(~mask, math.nan)

    return Batch(
        completion_mask=mask,
        groups=groups,
        rewards=torch.randint(0, 2, (count,), generator=generator).double(),
        old_logprobs=tokens(-3, 0),
        entropies=tokens(2, 0),
        cluster_ids=torch.randint(0, 3, (count,), generator=generator),
        sampling_logprobs=tokens(-3, 0),
        ref_logprobs=tokens(-3, 0),
        reward_heads=torch.randint(0, 5, (count, 2), generator=generator).double() / 4,
        head_names=("format", "brevity"),
        names=tuple(f"prompt-{int(g)}" for g in groups),
        answered=torch.rand(count, generator=generator) > 0.2,
        token_scores=tokens(2, -1),
    )
