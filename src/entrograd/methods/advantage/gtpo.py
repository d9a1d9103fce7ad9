"""GTPO: group token policy optimisation (Tan, Pan et al., arXiv 2508.04349).

Each token of a completion gets a reward shaped by its entropy: among the correct completions of a
group (O+) an uncertain token earns more, among the incorrect ones (O-) a confident token is
punished more. The shaped rewards are standardised into advantages.

Eq. 6 does not say over which population. The three readings, and what each does to the sign:

- own_set: O+ over its own tokens, O- over its own. The mean of R+ is then a1 + a2 exactly, a1 and
  a2 cancel, each set is zero-mean: half of the correct tokens are pushed down and nothing tells
  right from wrong.
- with_zeros (default): each set's population also holds a zero for every token of the other set.
  With N tokens in the group, n of them in O+, a correct token is positive iff its shaped reward
  exceeds the mean, sum R+ / N. Where all correct completions earn 1 that mean is (a1 + a2) n / N:
  every correct token is positive if n / N <= a1 / (a1 + a2) (10/11 by default), and beyond that
  those are not whose share in Eq. 3 is below ((a1 + a2) n / N - a1) / a2. Where they earn unequal
  rewards (fractional or composed ones) a completion is sure to be positive only if
  r_i >= (sum_{k in O+} r_k |o_k| + n a2 / a1) / N: with rewards .2, 1, 0 and equal entropies the
  first is negative. An incorrect token is negative, whatever the rewards, if its set holds at most
  a1 / (a1 + a2) of the tokens.
- joint: one standardisation over all tokens of the group.

Diagnostics log the share of correct tokens whose advantage is positive.

A completion is correct (O+) if its graded reward is above 0; r_i in Eq. 3 is its (composed)
reward as it is. A group whose rewards are all equal, or without a correct completion, gives zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entrograd.methods.batch import Batch
from entrograd.methods.components import AdvantageEstimator
from entrograd.methods.parameters import NonNegative
from entrograd.numerics import groups

SMALLEST_ENTROPY = 1e-8  # nats; 1/H and the sums of Eq. 3 and 5 stay finite


def clamped(entropies: Tensor, low: float | None, high: float | None) -> Tensor:
    """Entropies in nats, float64, clamped to what is asked for and to at least 1e-8."""
    floor = max(low or 0.0, SMALLEST_ENTROPY)
    ceiling = float("inf") if high is None else max(high, floor)
    return entropies.double().clamp(min=floor, max=ceiling)


def shares(weights: Tensor, mask: Tensor, sets: Tensor) -> Tensor:
    """[B, T] w_{i,t} / sum_k w_{k,t} * d_t over the completions k of a set still running at t.

    Their mean at each step is 1. Finished completions add nothing; 0 at padding.

    Args:
        weights: [B, T] above 0, float64; mask: [B, T]; sets: [B] long.
    """
    weights = torch.where(mask, weights, 0.0)
    running = groups.totals(mask, sets)
    return weights / torch.where(mask, groups.totals(weights, sets), 1.0) * running


def split(batch: Batch) -> Tensor:
    """[B] long: a number for the O+ and for the O- of each group."""
    return 2 * batch.groups + batch.correct


def has_signal(batch: Batch) -> Tensor:
    """[B] bool: the group has a correct completion and rewards that differ."""
    any_correct = groups.totals(batch.correct, batch.groups) > 0
    return any_correct & ~groups.all_equal(batch.rewards, batch.groups)


@dataclass(frozen=True)
class Gtpo(AdvantageEstimator):
    """The standardised reward of each token, shaped by its entropy."""

    name = "gtpo"
    paper = "arXiv 2508.04349"
    equation = "O+: a1 r_i + a2 H/sum(H) d_t;  O-: -a1 - a2 (1/H)/sum(1/H) h_t;  z-score of tokens"
    by_correctness = True

    # Eq. 3 and 5: weight of the outcome and of the entropy share
    a1: NonNegative = 1.0
    a2: NonNegative = 0.1
    # Eq. 6: the population of the z-score
    normalization: Literal["own_set", "with_zeros", "joint"] = "with_zeros"
    # Eq. 6: (x - mean) / (population std + epsilon)
    epsilon: NonNegative = 1e-8
    # entropies are clamped to [entropy_low, entropy_high] nats before Eq. 3 and 5; null: not
    entropy_low: NonNegative | None = None
    entropy_high: NonNegative | None = None

    def __post_init__(self) -> None:
        low, high = self.entropy_low, self.entropy_high
        if low is not None and high is not None and low > high:
            raise ValueError(f"entropy_low ({low}) must not exceed entropy_high ({high})")

    @property
    def required_columns(self) -> frozenset[str]:
        """The token entropies."""
        return frozenset({"entropies"})

    def shaped_rewards(self, batch: Batch) -> Tensor:
        """[B, T] Eq. 3 for O+, Eq. 5 for O-; float64, 0 at padding.

        r+_{i,t} = a1 r_i + a2 H_{i,t} / sum_{k in O+} H_{k,t} * d_t
        r-_{j,t} = -a1 - a2 (1/H_{j,t}) / sum_{k in O-} (1/H_{k,t}) * h_t
        """
        mask, correct = batch.completion_mask, batch.correct[:, None]
        entropies = clamped(batch.require("entropies"), self.entropy_low, self.entropy_high)
        weights = torch.where(correct, entropies, 1 / entropies)
        share = shares(weights, mask, split(batch))
        right = self.a1 * batch.rewards.double()[:, None] + self.a2 * share
        return torch.where(mask, torch.where(correct, right, -self.a1 - self.a2 * share), 0.0)

    def advantages(self, batch: Batch) -> Tensor:
        """[B, T] the z-score of the shaped rewards (Eq. 6), over the population named."""
        rewards, mask = self.shaped_rewards(batch), batch.completion_mask
        sets = batch.groups if self.normalization == "joint" else split(batch)
        members = split(batch) if self.normalization == "own_set" else batch.groups
        population = groups.totals(batch.lengths, members)
        scores = groups.token_zscore(rewards, mask, sets, population, self.epsilon)
        return torch.where(has_signal(batch)[:, None], scores, 0.0).to(batch.rewards.dtype)

    def working(self, batch: Batch) -> Mapping[str, Tensor]:
        """The shaped rewards."""
        return {"shaped_rewards": self.shaped_rewards(batch)}
