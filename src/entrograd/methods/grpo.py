"""GRPO: group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300).

A completion's advantage is its reward standardised within its group; every token gets it. The
loss is PPO's clipped surrogate, the mean over a completion's tokens, then over completions, with
an optional penalty towards a reference policy.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from entrograd.methods.base import Batch, Method
from entrograd.methods.options import (
    ClipLow,
    LossOptions,
    NonNegative,
    optional_columns,
    with_options,
)
from entrograd.numerics import aggregate, groups, surrogate


@dataclass(frozen=True)
class Params(LossOptions):
    """GRPO's parameters."""

    # A_i = (r_i - mean r) / (s + epsilon), s the sample standard deviation (over n - 1)
    epsilon: NonNegative = 1e-4
    # Eq. 3: rho clipped to [1 - clip_low, 1 + clip_high]
    clip_low: ClipLow = 0.2
    clip_high: NonNegative = 0.2


def to_tokens(scores: Tensor, batch: Batch) -> Tensor:
    """[B, T] a completion's score [B] at each of its tokens, 0 at padding."""
    return scores.to(batch.rewards.dtype)[:, None] * batch.completion_mask


def advantages(batch: Batch, params: Params) -> Tensor:
    """[B, T] A_i = (r_i - mean r) / (s + epsilon) at every token; 0 where rewards are equal."""
    scores = groups.zscore(batch.rewards, batch.groups, params.epsilon, sample=True)
    return to_tokens(scores, batch)


def policy_loss(logprobs: Tensor, advantages: Tensor, batch: Batch, params: Params) -> Tensor:
    """[B, T] -min(rho A, clip(rho) A) + kl_coefficient * KL (Eq. 3)."""
    ratio = surrogate.token_ratio(logprobs, batch.old_logprobs, batch.completion_mask)
    loss = surrogate.clipped(ratio, advantages, params.clip_low, params.clip_high)
    return with_options(loss, logprobs, batch, params)


METHOD = Method(
    name="grpo",
    params=Params,
    required_columns=frozenset(),
    advantages=advantages,
    policy_loss=policy_loss,
    aggregate=aggregate.sequence_mean,
    loss_needs=optional_columns,
    paper="arXiv 2402.03300",
    equation="A_i = (r_i - mean r) / (std r + 1e-4); mean_i mean_t min(rho A, clip(rho) A)",
)
