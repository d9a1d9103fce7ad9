"""GRPO-S: the sequence-level variant of GTPO (Tan, Pan et al., arXiv 2508.04349).

A completion's reward is shaped by its mean entropy relative to the other correct (incorrect)
ones of its group and standardised over the group.

Correctness, the entropy floor and groups without a signal are as in GTPO.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from entrograd.methods.advantage.gtpo import SMALLEST_ENTROPY, has_signal, split
from entrograd.methods.batch import Batch
from entrograd.methods.components import AdvantageEstimator
from entrograd.methods.parameters import NonNegative
from entrograd.numerics import groups, masked


@dataclass(frozen=True)
class GrpoS(AdvantageEstimator):
    """The standardised reward of each completion, shaped by its mean entropy."""

    name = "grpo_s"
    paper = "arXiv 2508.04349"
    equation = "O+: b1 r_i + b2 Hbar_i/sum(Hbar) n;  O-: -b1 - b2 (1/Hbar)/sum(1/Hbar) m;  z-score"
    by_correctness = True

    # Eq. 9: weight of the outcome and of the entropy share
    b1: NonNegative = 1.0
    b2: NonNegative = 0.1
    # (x - mean) / (population std + epsilon) over the group
    epsilon: NonNegative = 1e-8

    @property
    def required_columns(self) -> frozenset[str]:
        """The token entropies."""
        return frozenset({"entropies"})

    def shaped_rewards(self, batch: Batch) -> Tensor:
        """[B] Eq. 9, float64, with Hbar_i the mean entropy of completion i (nats).

        O+: b1 r_i + b2 Hbar_i / sum_{O+} Hbar * n;  O-: -b1 - b2 (1/Hbar_j) / sum_{O-} (1/Hbar) * m
        """
        entropies = batch.require("entropies").double()
        means = masked.means(entropies, batch.completion_mask).clamp(min=SMALLEST_ENTROPY)
        weights, sets = torch.where(batch.correct, means, 1 / means), split(batch)
        share = weights / groups.totals(weights, sets) * groups.sizes(sets)
        right = self.b1 * batch.rewards.double() + self.b2 * share
        return torch.where(batch.correct, right, -self.b1 - self.b2 * share)

    def advantages(self, batch: Batch) -> Tensor:
        """[B, T] the shaped reward standardised over its group, at every token."""
        rewards = self.shaped_rewards(batch)
        scores = groups.zscore(rewards, batch.groups, self.epsilon, sample=False)
        return batch.to_tokens(torch.where(has_signal(batch), scores, 0.0))

    def working(self, batch: Batch) -> Mapping[str, Tensor]:
        """The shaped rewards."""
        return {"shaped_rewards": self.shaped_rewards(batch)}
