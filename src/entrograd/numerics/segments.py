"""Segments of completions: where a sequence of token scores is cut, as numbers from 0."""

from __future__ import annotations

import torch
from torch import Tensor


def change_segments(
    scores: Tensor, mask: Tensor, delta: float, baseline: float, min_length: int
) -> Tensor:
    """[B, T] long: a segment starts where |v_t - v_{t-1}| > delta or sign(v_t - baseline) changes
    (our reading of arXiv 2411.00809v3; methods.md, section 4).

    No segment is shorter than `min_length` tokens unless the completion is. `scores` [B, T] and
    `mask` [B, T] bool, padding on the right.
    """
    lengths, starts = mask.sum(-1), torch.zeros_like(mask, dtype=torch.long)
    jump = (scores[:, 1:] - scores[:, :-1]).abs() > delta
    side = (scores - baseline).sign()
    wanted = jump | (side[:, 1:] != side[:, :-1])
    start = torch.zeros_like(lengths)
    for t in range(1, mask.shape[1]):
        fits = (t - start >= min_length) & (lengths - t >= min_length)
        cut = wanted[:, t - 1] & fits
        start = torch.where(cut, t, start)
        starts[:, t] = cut
    return starts.cumsum(-1)


def entropy_segments(entropies: Tensor, mask: Tensor, cutoff: float) -> Tensor:
    """[B, T] long: a segment closes after each token with H > cutoff (arXiv 2501.02790)."""
    closed = mask & (entropies > cutoff)
    return closed.long().cumsum(-1) - closed.long()


def segment_means(scores: Tensor, mask: Tensor, segments: Tensor) -> Tensor:
    """[B, T] the mean score of each position's segment, float64, 0 at padding."""
    rows, width = scores.shape
    key = (torch.arange(rows, device=scores.device)[:, None] * width + segments).flatten()
    weight = mask.double().flatten()
    total = torch.zeros(rows * width, dtype=torch.float64, device=scores.device)
    count = total.index_add(0, key, weight)[key].clamp(min=1)
    total = total.index_add(0, key, scores.double().flatten() * weight)[key]
    return torch.where(mask, (total / count).reshape(rows, width), 0.0)
