"""DAPO: decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476).

GRPO's advantage with a wider upper clip, the mean over all tokens of the batch, and a soft
penalty for completions that approach the length limit. Its dynamic sampling, which keeps drawing
until the batch is full of groups with both correct and incorrect completions, is the online
trainer's, for any method: `train_online.dynamic_sampling`, off by default, keeps groups that have
an advantage. Without it a group without signal gives zero advantage and costs no forward pass.
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
    RewardOptions,
    optional_columns,
    with_penalty,
)
from entrograd.numerics import aggregate


@dataclass(frozen=True)
class Params(RewardOptions, LossOptions):
    """DAPO's parameters."""

    # A_i = (r_i - mean r) / (sample std + epsilon)  (Eq. 9)
    epsilon: NonNegative = 1e-4
    # Eq. 8: rho clipped to [1 - clip_low, 1 + clip_high]
    clip_low: ClipLow = 0.2
    clip_high: NonNegative = 0.28


def compose_rewards(batch: Batch, params: Params) -> Tensor:
    """[B] the graded reward plus the overlong penalty (Eq. 13)."""
    return with_penalty(batch.rewards, batch, params)


METHOD = Method(
    name="dapo",
    params=Params,
    required_columns=frozenset(),
    advantages=grpo.advantages,
    policy_loss=grpo.policy_loss,
    aggregate=aggregate.token_mean,
    about="loss",
    compose_rewards=compose_rewards,
    loss_needs=optional_columns,
    paper="arXiv 2503.14476",
    equation="GRPO's A_i; sum_{i,t} min(rho A, clip(rho, .8, 1.28) A) / sum_i |o_i|",
)
