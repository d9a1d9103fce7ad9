"""SEED-GRPO: semantic-entropy-aware weighting of a prompt's update (arXiv 2505.12346v1).

The more the answers to one prompt disagree, the less the model is sure of its meaning and the
smaller the update: advantages times f(alpha * SE / SE_max), SE the semantic entropy of the group
over clusters of equal final answers, SE_max = ln G.

The paper does not print f and its Eq. 5 for SE is not bounded by ln G; see docs/papers.md. With
the default alpha the weight stays within [0.960, 1]: alpha is the knob to sweep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entrograd.methods.batch import Batch
from entrograd.methods.components import PromptWeighting
from entrograd.methods.parameters import NonNegative
from entrograd.methods.semantic_entropy import group_entropy, mean_logprobs
from entrograd.numerics import groups
from entrograd.numerics.semantic_entropy import Estimator, cluster_shares, sequence_weights


@dataclass(frozen=True)
class SeedGrpo(PromptWeighting):
    """A weight that falls with the semantic entropy of the group."""

    name = "seed_grpo"
    paper = "arXiv 2505.12346v1"
    equation = "f(alpha * SE / ln G)"

    # Eq. 6: A_i * f(alpha * SE / ln G)
    alpha: NonNegative = 0.0417
    # SE: rao -sum p ln p; discrete the same over counts; paper -(1/K) sum ln p (Eq. 5)
    estimator: Estimator = "rao"
    # f(x): linear 1-x; exponential e^-x; focal (1-x)^gamma; reciprocal 1/(1+x); never below 0
    f: Literal["linear", "exponential", "focal", "reciprocal"] = "reciprocal"
    gamma: NonNegative = 2.0

    @property
    def required_columns(self) -> frozenset[str]:
        """The answer clusters, and the likelihoods that weigh them unless counts do."""
        likelihoods = set() if self.estimator == "discrete" else {"old_logprobs"}
        return frozenset({"cluster_id"} | likelihoods)

    def decay(self, x: Tensor) -> Tensor:
        """[...] f(x) for x >= 0: non-increasing, non-negative, f(0) = 1 (Eq. 6)."""
        if self.f == "linear":
            return (1 - x).clamp(min=0)
        if self.f == "exponential":
            return (-x).exp()
        if self.f == "focal":
            return (1 - x).clamp(min=0) ** self.gamma
        return 1 / (1 + x)

    def weights(self, batch: Batch) -> Tensor:
        """[B] f(alpha * SE / ln G), G the size of the completion's group; 1 in a group of one."""
        entropy = group_entropy(batch, self.estimator)
        largest = groups.sizes(batch.groups).log()
        x = self.alpha * entropy / torch.where(largest > 0, largest, 1.0)
        return torch.where(largest > 0, self.decay(x), 1.0).to(batch.rewards.dtype)

    def working(self, batch: Batch) -> Mapping[str, Tensor]:
        """The mass of each completion's cluster, the group's semantic entropy and the weight."""
        mass = sequence_weights(mean_logprobs(batch), batch.groups)
        if self.estimator == "discrete":
            mass = torch.ones_like(mass)
        return {
            "cluster_mass": cluster_shares(mass, batch.groups, batch.require("cluster_ids")),
            "semantic_entropy": group_entropy(batch, self.estimator),
            "weight": self.weights(batch),
        }
