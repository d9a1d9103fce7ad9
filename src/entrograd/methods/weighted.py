"""Weighted composition: a fixed weight for each reward head, GRPO's credit and loss.

The plain alternative to ENCORE's weights. The word `reward` among the weights is the graded reward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from entrograd.errors import InputError
from entrograd.methods import grpo
from entrograd.methods.base import Batch, Method
from entrograd.methods.options import Finite, RewardOptions, optional_columns, with_penalty
from entrograd.numerics import aggregate
from entrograd.numerics.ratings import composed


@dataclass(frozen=True)
class Params(RewardOptions, grpo.Params):
    """The weights, beside GRPO's parameters and the overlong penalty's."""

    # r_i = sum_k weights[k] psi_{i,k}; a head that is not named weighs 0
    weights: dict[str, Finite] = field(default_factory=lambda: {"reward": 1.0})


def compose_rewards(batch: Batch, params: Params) -> Tensor:
    """[B] sum_k w_k psi_{i,k}, `reward` standing for the graded reward, plus the overlong
    penalty."""
    heads = {"reward": batch.rewards}
    for name in params.weights:
        if name == "reward":
            continue
        if name not in batch.head_names:
            raise InputError(
                f"params.yaml: method.weighted.weights.{name}: no such reward head; there are "
                f"{', '.join(('reward', *batch.head_names))}"
            )
        heads[name] = batch.require("reward_heads")[:, batch.head_names.index(name)]
    weights = [params.weights.get(name, 0.0) for name in heads]
    columns = torch.stack([column.double() for column in heads.values()], -1)
    return with_penalty(composed(columns, weights), batch, params)


def weights_by_name(head_names: tuple[str, ...], params: Params) -> dict[str, float]:
    """The weight of the graded reward and of each head, by name."""
    return {name: params.weights.get(name, 0.0) for name in ("reward", *head_names)}


def needs(params: Params) -> frozenset[str]:
    """The reward heads, where any is weighed."""
    return frozenset({"reward_heads"} if set(params.weights) - {"reward"} else ())


METHOD = Method(
    name="weighted",
    params=Params,
    advantages=grpo.advantages,
    policy_loss=grpo.policy_loss,
    aggregate=aggregate.sequence_mean,
    about="reward",
    compose_rewards=compose_rewards,
    needs_for=needs,
    loss_needs=optional_columns,
    head_weights=weights_by_name,
    paper="fixed weights; the plain baseline of arXiv 2503.20995",
    equation="r_i = sum_k w_k psi_{i,k}, w fixed; GRPO",
)
