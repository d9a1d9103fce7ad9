"""Semantic entropy of groups whose completions are clustered by answer, in nats.

`groups` and `cluster_ids` are [B]; completions of one group with equal ids share an answer. All
results are float64, one value per completion: that of its group.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from entrograd.numerics import groups as by_group

Estimator = Literal["rao", "discrete", "paper"]


def sequence_weights(mean_logprobs: Tensor, groups: Tensor) -> Tensor:
    """[B] exp(ell_i) / sum over the group, ell_i the completion's mean old logprob."""
    ell = mean_logprobs.double()
    weights = (ell - by_group.largest(ell, groups)).exp()
    return weights / by_group.totals(weights, groups)


def cluster_shares(weights: Tensor, groups: Tensor, cluster_ids: Tensor) -> Tensor:
    """[B] the share of the group's weight that a completion's cluster holds.

    p_k = sum_{i in C_k} w_i / sum_i w_i.
    """
    clusters = _number_clusters(groups, cluster_ids)
    return by_group.totals(weights, clusters) / by_group.totals(weights, groups)


def semantic_entropy(
    mean_logprobs: Tensor, groups: Tensor, cluster_ids: Tensor, estimator: Estimator
) -> Tensor:
    """[B] the group's semantic entropy (arXiv 2505.12346v1, Eq. 4 and 5, and its estimators).

    rao: -sum_k p_k ln p_k with p_k the likelihood mass of cluster k.
    discrete: the same with p_k = n_k / G, counts alone.
    paper: -(1/K) sum_k ln p_k over the K clusters, as printed; not bounded by ln G.
    """
    if estimator == "discrete":
        weights = torch.ones_like(mean_logprobs, dtype=torch.float64)
    else:
        weights = sequence_weights(mean_logprobs, groups)
    shares = cluster_shares(weights, groups, cluster_ids)
    # A sum over clusters is a sum over completions, each counting for 1 / n_k.
    once = 1 / by_group.sizes(_number_clusters(groups, cluster_ids))
    surprisal = -shares.clamp(min=torch.finfo(torch.float64).tiny).log()
    if estimator == "paper":
        return by_group.totals(once * surprisal, groups) / by_group.totals(once, groups)
    return by_group.totals(once * shares * surprisal, groups)


def _number_clusters(groups: Tensor, cluster_ids: Tensor) -> Tensor:
    """[B] a number for each (group, cluster) pair, over the whole batch."""
    pairs = torch.stack([groups, cluster_ids.to(groups.dtype)])
    return torch.unique(pairs, dim=1, return_inverse=True)[1]
