"""DAPO: decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476).

GRPO's advantage with a wider upper clip, the mean over all tokens of the batch, and a soft
penalty for completions that approach the length limit. Its dynamic sampling keeps prompts whose
group has both correct and incorrect completions; here a group without signal gives zero
advantage and costs no forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from entrograd.methods import grpo
from entrograd.methods.base import Batch, Method
from entrograd.methods.options import ClipLow, LossOptions, NonNegative, optional_columns
from entrograd.numerics import aggregate

Tokens = Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class Params(LossOptions):
    """DAPO's parameters."""

    # A_i = (r_i - mean r) / (sample std + epsilon)  (Eq. 9)
    epsilon: NonNegative = 1e-4
    # Eq. 8: rho clipped to [1 - clip_low, 1 + clip_high]
    clip_low: ClipLow = 0.2
    clip_high: NonNegative = 0.28
    # Eq. 13: Lmax, the length from which the penalty is -1 (paper: 20480); null: no penalty
    overlong_length: Tokens | None = None
    # Eq. 13: Lc, the length over which it rises (paper: 4096)
    overlong_buffer: Tokens = 4096

    def __post_init__(self) -> None:
        if self.overlong_length is not None and self.overlong_buffer > self.overlong_length:
            raise ValueError(
                f"overlong_buffer ({self.overlong_buffer}) must not exceed overlong_length "
                f"({self.overlong_length})"
            )


def overlong_penalty(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """[B] 0 up to Lmax - Lc, then linear to -1 at Lmax, -1 beyond (Eq. 13), float64.

    Args:
        lengths: [B] tokens; longest: Lmax; buffer: Lc.
    """
    return ((longest - buffer - lengths.double()) / buffer).clamp(min=-1.0, max=0.0)


def compose_rewards(batch: Batch, params: Params) -> Tensor:
    """[B] the graded reward plus the overlong penalty."""
    if params.overlong_length is None:
        return batch.rewards
    penalty = overlong_penalty(batch.lengths, params.overlong_length, params.overlong_buffer)
    return batch.rewards + penalty.to(batch.rewards.dtype)


METHOD = Method(
    name="dapo",
    params=Params,
    needs=frozenset(),
    advantages=grpo.advantages,
    policy_loss=grpo.policy_loss,
    aggregate=aggregate.token_mean,
    about="loss",
    compose_rewards=compose_rewards,
    loss_needs=optional_columns,
    paper="arXiv 2503.14476",
    equation="GRPO's A_i; sum_{i,t} min(rho A, clip(rho, .8, 1.28) A) / sum_i |o_i|",
)
