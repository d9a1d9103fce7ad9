"""CISPO: clipped importance-sampling policy optimisation (MiniMax-M1, arXiv 2506.13585).

The ratio is clipped and taken as a constant weight of log pi, so no token ever loses its
gradient. The clip is an upper one only.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from entrograd.methods import grpo
from entrograd.methods.base import Batch, Method
from entrograd.methods.options import LossOptions, NonNegative, optional_columns, with_options
from entrograd.numerics import aggregate, surrogate


@dataclass(frozen=True)
class Params(LossOptions):
    """CISPO's parameters."""

    # A_i = (r_i - mean r) / (sample std + epsilon)
    epsilon: NonNegative = 1e-4
    # Eq. 5: weight min(rho, 1 + clip_high)
    clip_high: NonNegative = 4.0


def policy_loss(logprobs: Tensor, advantages: Tensor, batch: Batch, params: Params) -> Tensor:
    """[B, T] -sg(min(rho, 1 + clip_high)) A log pi (Eq. 4 and 5)."""
    loss = surrogate.weighted_likelihood(
        logprobs, batch.old_logprobs, advantages, batch.completion_mask, params.clip_high
    )
    return with_options(loss, logprobs, batch, params)


METHOD = Method(
    name="cispo",
    params=Params,
    required_columns=frozenset(),
    advantages=grpo.advantages,
    policy_loss=policy_loss,
    aggregate=aggregate.token_mean,
    about="loss",
    loss_needs=optional_columns,
    clips_weight=True,
    paper="arXiv 2506.13585",
    equation="-sg(min(rho, 1 + clip_high)) A_i log pi, over all tokens",
)
