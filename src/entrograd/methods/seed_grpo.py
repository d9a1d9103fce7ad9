"""SEED-GRPO: semantic-entropy-aware modulation of a prompt's update (arXiv 2505.12346v1).

The more the answers to one prompt disagree, the less the model is sure of its meaning and the
smaller the update: Dr.GRPO's advantage times f(alpha * SE / SE_max), SE the semantic entropy of
the group over clusters of equal final answers, SE_max = ln G.

The paper does not print f and its Eq. 5 for SE is not bounded by ln G; see docs/papers.md. With
the default alpha the multiplier stays within [0.960, 1]: alpha is the knob to sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entrograd.methods import dr_grpo, grpo
from entrograd.methods.base import Batch, Method
from entrograd.methods.options import NonNegative, optional_columns
from entrograd.numerics import aggregate, groups, masked
from entrograd.numerics.semantic_entropy import (
    Estimator,
    cluster_shares,
    semantic_entropy,
    sequence_weights,
)


@dataclass(frozen=True)
class Params(dr_grpo.Params):
    """SEED-GRPO's parameters; credit and loss are Dr.GRPO's."""

    # Eq. 6: A_i * f(alpha * SE / ln G)
    alpha: NonNegative = 0.0417
    # SE: rao -sum p ln p; discrete the same over counts; paper -(1/K) sum ln p (Eq. 5)
    estimator: Estimator = "rao"
    # f(x): linear 1-x; exponential e^-x; focal (1-x)^gamma; reciprocal 1/(1+x); never below 0
    f: Literal["linear", "exponential", "focal", "reciprocal"] = "reciprocal"
    gamma: NonNegative = 2.0


def mean_logprobs(batch: Batch) -> Tensor:
    """[B] ell_i = mean_t log pi_old(o_{i,t}), nats, float64."""
    return masked.means(batch.old_logprobs.double(), batch.completion_mask)


def group_entropy(batch: Batch, estimator: Estimator) -> Tensor:
    """[B] the semantic entropy of each completion's group in nats, float64."""
    clusters = batch.require("cluster_ids")
    return semantic_entropy(mean_logprobs(batch), batch.groups, clusters, estimator)


def decay(x: Tensor, params: Params) -> Tensor:
    """[...] f(x) for x >= 0: non-increasing, non-negative, f(0) = 1 (Eq. 6)."""
    if params.f == "linear":
        return (1 - x).clamp(min=0)
    if params.f == "exponential":
        return (-x).exp()
    if params.f == "focal":
        return (1 - x).clamp(min=0) ** params.gamma
    return 1 / (1 + x)


def modulate(batch: Batch, params: Params) -> Tensor:
    """[B] f(alpha * SE / ln G), G the size of the completion's group; 1 in a group of one."""
    entropy = group_entropy(batch, params.estimator)
    largest = groups.sizes(batch.groups).log()
    x = params.alpha * entropy / torch.where(largest > 0, largest, 1.0)
    return torch.where(largest > 0, decay(x, params), 1.0).to(batch.rewards.dtype)


def working(batch: Batch, params: Params) -> dict[str, Tensor]:
    """The mass of each completion's cluster, the group's semantic entropy and the multiplier."""
    weights = sequence_weights(mean_logprobs(batch), batch.groups)
    if params.estimator == "discrete":
        weights = torch.ones_like(weights)
    return {
        "cluster_mass": cluster_shares(weights, batch.groups, batch.require("cluster_ids")),
        "semantic_entropy": group_entropy(batch, params.estimator),
        "multiplier": modulate(batch, params),
    }


def needs(params: Params) -> frozenset[str]:
    """The answer clusters, and the likelihoods that weigh them unless counts do."""
    columns = {"cluster_id", "old_logprobs"}
    return frozenset(columns - ({"old_logprobs"} if params.estimator == "discrete" else set()))


METHOD = Method(
    name="seed_grpo",
    params=Params,
    advantages=dr_grpo.advantages,
    policy_loss=grpo.policy_loss,
    aggregate=aggregate.constant_length,
    about="modulation",
    modulate=modulate,
    needs_for=needs,
    loss_needs=optional_columns,
    working=working,
    paper="arXiv 2505.12346v1",
    equation="A_i = (r_i - mean r) * f(alpha * SE / ln G)",
)
