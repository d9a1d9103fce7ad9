"""Dr.GRPO: GRPO done right (arXiv 2503.20783).

GRPO without its two biases: no division by the group's standard deviation (which weighs prompts
by difficulty) and no division by each completion's own length (which favours long wrong ones).
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
)
from entrograd.numerics import aggregate, groups


@dataclass(frozen=True)
class Params(LossOptions):
    """Dr.GRPO's parameters."""

    # rho clipped to [1 - clip_low, 1 + clip_high]
    clip_low: ClipLow = 0.2
    clip_high: NonNegative = 0.2


def advantages(batch: Batch, params: Params) -> Tensor:  # noqa: ARG001 - the contract's shape
    """[B, T] A_i = r_i - mean r at every token; 0 where rewards are equal."""
    return grpo.to_tokens(groups.centered(batch.rewards, batch.groups), batch)


METHOD = Method(
    name="dr_grpo",
    params=Params,
    required_columns=frozenset(),
    advantages=advantages,
    policy_loss=grpo.policy_loss,
    aggregate=aggregate.constant_length,
    loss_needs=optional_columns,
    paper="arXiv 2503.20783",
    equation="A_i = r_i - mean r; sum_{i,t} min(rho A, clip(rho) A) / (B L)",
)
