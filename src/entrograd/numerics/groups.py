"""Statistics over groups of completions, for ragged groups in any order.

`groups` [B] (long) numbers each completion's group from 0. Every function works in float64 and
answers with one value per completion (or a position): that of its group.

A deviation from the mean that rounding alone can make is exactly 0: see `settled`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Relative to the largest value of a group: what sums in float64 may be off by.
ROUNDING = 1e-12


def totals(values: Tensor, groups: Tensor) -> Tensor:
    """[B, ...] the sum of `values` [B, ...] over each completion's group, float64."""
    values = values.double()
    count = int(groups.max()) + 1
    summed = values.new_zeros((count, *values.shape[1:])).index_add(0, groups, values)
    return summed[groups]


def sizes(groups: Tensor) -> Tensor:
    """[B] the number of completions in each completion's group, float64."""
    return totals(torch.ones_like(groups, dtype=torch.float64), groups)


def largest(values: Tensor, groups: Tensor) -> Tensor:
    """[B] the largest of `values` [B] in each completion's group, float64."""
    values = values.double()
    lowest = values.new_full((int(groups.max()) + 1,), -torch.inf)
    return lowest.scatter_reduce(0, groups, values, "amax")[groups]


def settled(deviations: Tensor, values: Tensor, groups: Tensor) -> Tensor:
    """[B, ...] `deviations` of `values` from a mean over their group, 0 where they are rounding.

    Rounding is up to 1e-12 of the group's largest |value| or, where `values` are stored with fewer
    digits (float32), the precision of their type. All that decides whether values are equal, or on
    which side of their mean one is, goes through here.
    """
    relative = torch.finfo(values.dtype).eps if values.is_floating_point() else 0.0
    size = largest(values.abs().reshape(len(values), -1).amax(-1), groups)
    bound = (max(ROUNDING, relative) * size).reshape(-1, *[1] * (values.ndim - 1))
    return deviations.masked_fill(deviations.abs() <= bound, 0.0)


def all_equal(values: Tensor, groups: Tensor) -> Tensor:
    """[B] bool: no completion of the group deviates from its mean (a group of one: True)."""
    return totals(centered(values, groups) != 0, groups) == 0


def centered(values: Tensor, groups: Tensor) -> Tensor:
    """[B] value minus the mean of its group, float64.

    A_i = r_i - mean(r)  (arXiv 2503.20783). Exactly 0 where a value is the mean, up to rounding.
    """
    return settled(values.double() - totals(values, groups) / sizes(groups), values, groups)


def zscore(values: Tensor, groups: Tensor, epsilon: float, *, sample: bool) -> Tensor:
    """[B] value standardised within its group, float64.

    A_i = (r_i - mean(r)) / (std(r) + epsilon), std over n-1 (`sample`) or over n (population).
    Exactly 0 where all values of a group are equal, so also in a group of one.
    """
    deviations = centered(values, groups)
    degrees = (sizes(groups) - 1).clamp(min=1) if sample else sizes(groups)
    std = (totals(deviations**2, groups) / degrees).sqrt()
    return deviations / torch.where(std > 0, std + epsilon, 1.0)


def token_zscore(
    values: Tensor, mask: Tensor, sets: Tensor, population: Tensor, epsilon: float
) -> Tensor:
    """[B, T] token values standardised within their set of completions, float64, 0 at padding.

    mean = sum_set x / N,  var = (sum_set (x - mean)^2 + (N - n) mean^2) / N  (population),
    (x - mean) / (std + epsilon), with n tokens in the set and N = `population`: N > n means that
    N - n zeros belong to the population too.

    Args:
        values: [B, T]; mask: [B, T] bool.
        sets: [B] long, the set of each completion.
        population: [B] the size N of that set's population, in tokens.
    """
    values = torch.where(mask, values.double(), 0.0)
    tokens = totals(mask.sum(-1), sets)
    size = population.double().clamp(min=1)
    mean = totals(values.sum(-1), sets) / size
    deviations = torch.where(mask, settled(values - mean[:, None], values, sets), 0.0)
    squares = totals((deviations**2).sum(-1), sets) + (size - tokens).clamp(min=0) * mean**2
    std = (squares / size).sqrt()
    return deviations / torch.where(std > 0, std + epsilon, 1.0)[:, None]
