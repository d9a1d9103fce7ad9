"""GRPO-S: the sequence-level variant of GTPO (Tan, Pan et al., arXiv 2508.04349).

A completion's reward is shaped by its mean entropy relative to the other correct (incorrect)
ones of its group, standardised over the group; its ratio is the arithmetic mean of its tokens'.

Correctness, the entropy floor and groups without a signal are as in GTPO.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entrograd.methods.base import Batch, Method
from entrograd.methods.grpo import to_tokens
from entrograd.methods.gtpo import SMALLEST_ENTROPY, has_signal, split
from entrograd.methods.options import (
    ClipLow,
    LossOptions,
    NonNegative,
    optional_columns,
    with_options,
)
from entrograd.numerics import aggregate, groups, masked, surrogate


@dataclass(frozen=True)
class Params(LossOptions):
    """GRPO-S's parameters."""

    # Eq. 9: weight of the outcome and of the entropy share
    b1: NonNegative = 1.0
    b2: NonNegative = 0.1
    # (x - mean) / (population std + epsilon) over the group
    epsilon: NonNegative = 1e-8
    # Eq. 10: w_i clipped to [1 - clip_low, 1 + clip_high]
    clip_low: ClipLow = 0.2
    clip_high: NonNegative = 0.28


def shaped_rewards(batch: Batch, params: Params) -> Tensor:
    """[B] Eq. 9, float64, with Hbar_i the mean entropy of completion i (nats).

    O+: b1 r_i + b2 Hbar_i / sum_{O+} Hbar * n;  O-: -b1 - b2 (1/Hbar_j) / sum_{O-} (1/Hbar) * m.
    """
    entropies = batch.require("entropies").double()
    means = masked.means(entropies, batch.completion_mask).clamp(min=SMALLEST_ENTROPY)
    weights, sets = torch.where(batch.correct, means, 1 / means), split(batch)
    share = weights / groups.totals(weights, sets) * groups.sizes(sets)
    right = params.b1 * batch.rewards.double() + params.b2 * share
    return torch.where(batch.correct, right, -params.b1 - params.b2 * share)


def advantages(batch: Batch, params: Params) -> Tensor:
    """[B, T] the shaped reward standardised over its group, at every token."""
    rewards = shaped_rewards(batch, params)
    scores = groups.zscore(rewards, batch.groups, params.epsilon, sample=False)
    return to_tokens(torch.where(has_signal(batch), scores, 0.0), batch)


def working(batch: Batch, params: Params) -> dict[str, Tensor]:
    """The shaped rewards."""
    return {"shaped_rewards": shaped_rewards(batch, params)}


def policy_loss(logprobs: Tensor, advantages: Tensor, batch: Batch, params: Params) -> Tensor:
    """[B, T] -min(w_i A, clip(w_i) A), w_i = mean_t rho_t (Eq. 10 and 11)."""
    ratio = surrogate.arithmetic_ratio(logprobs, batch.old_logprobs, batch.completion_mask)
    loss = surrogate.clipped(ratio, advantages, params.clip_low, params.clip_high)
    return with_options(loss, logprobs, batch, params)


METHOD = Method(
    name="grpo_s",
    params=Params,
    required_columns=frozenset({"entropies"}),
    advantages=advantages,
    policy_loss=policy_loss,
    aggregate=aggregate.sequence_mean,
    loss_needs=optional_columns,
    ratio=surrogate.arithmetic_ratio,
    working=working,
    by_correctness=True,
    paper="arXiv 2508.04349",
    equation="O+: b1 r_i + b2 Hbar_i/sum(Hbar) n;  O-: -b1 - b2 (1/Hbar)/sum(1/Hbar) m;  z-score",
)
