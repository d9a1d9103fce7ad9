"""GSPO: group sequence policy optimisation (arXiv 2507.18071).

GRPO's advantage with one importance ratio a completion, the geometric mean of its tokens' ratios,
and a clip range two orders of magnitude narrower. With credit that varies between tokens it is the
paper's GSPO-token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from entrograd.methods import grpo
from entrograd.methods.base import Batch, Method
from entrograd.methods.options import (
    ClipLow,
    LossOptions,
    NonNegative,
    optional_columns,
    with_options,
)
from entrograd.numerics import aggregate, surrogate


@dataclass(frozen=True)
class Params(LossOptions):
    """GSPO's parameters."""

    # A_i = (r_i - mean r) / (sample std + epsilon)  (Eq. 6)
    epsilon: NonNegative = 1e-4
    # Eq. 5: s_i clipped to [1 - clip_low, 1 + clip_high]
    clip_low: ClipLow = 3e-4
    clip_high: NonNegative = 4e-4


def policy_loss(logprobs: Tensor, advantages: Tensor, batch: Batch, params: Params) -> Tensor:
    """[B, T] -min(s_i A, clip(s_i) A), s_i = exp(mean_t log rho_t) (Eq. 5 and 7; 13 and 14)."""
    ratio = surrogate.geometric_ratio(logprobs, batch.old_logprobs, batch.completion_mask)
    loss = surrogate.clipped(ratio, advantages, params.clip_low, params.clip_high)
    return with_options(loss, logprobs, batch, params)


METHOD = Method(
    name="gspo",
    params=Params,
    required_columns=frozenset(),
    advantages=grpo.advantages,
    policy_loss=policy_loss,
    aggregate=aggregate.sequence_mean,
    about="loss",
    loss_needs=optional_columns,
    ratio=surrogate.geometric_ratio,
    paper="arXiv 2507.18071",
    equation="s_i = exp(mean_t log rho); mean_i min(s_i A_i, clip(s_i) A_i)",
)
