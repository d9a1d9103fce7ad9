"""Sums, means and quantiles over the trained positions of right-padded [B, T] tensors.

What stands at padding never matters, NaN and infinities included: it is replaced, not multiplied.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fill(values: Tensor, mask: Tensor, value: float = 0.0) -> Tensor:
    """[B, T] `values` where `mask` is True, else `value`; no gradient reaches padding."""
    return torch.where(mask, values, torch.full_like(values, value))


def sums(values: Tensor, mask: Tensor) -> Tensor:
    """[B] the sum of each row's trained positions."""
    return fill(values, mask).sum(-1)


def means(values: Tensor, mask: Tensor) -> Tensor:
    """[B] the mean of each row's trained positions; 0 for a row without any."""
    return sums(values, mask) / mask.sum(-1).clamp(min=1)


def quantile(values: Tensor, mask: Tensor, q: float) -> Tensor:
    """The q-quantile of all trained positions, linear between neighbours (as numpy's default).

    A scalar of the dtype of `values`; NaN where nothing is trained on.
    """
    ordered = values[mask].sort().values
    if ordered.numel() == 0:
        return values.new_full((), float("nan"))
    place = q * (ordered.numel() - 1)
    below = min(int(place), ordered.numel() - 1)
    above = min(below + 1, ordered.numel() - 1)
    return torch.lerp(ordered[below], ordered[above], place - below)
