"""ENCORE: entropy-penalised composition of many reward heads (arXiv 2503.20995).

A rule whose ratings are spread over the whole scale tells little; a head's weight falls with the
entropy of its ratings over the annotated data set. The weights need no training and are the same
for every completion. Credit and loss are GRPO's: ENCORE as the reward of reinforcement learning is
this project's extension, the paper weighs the heads of a reward model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from entrograd.errors import InputError
from entrograd.methods import grpo
from entrograd.methods.base import Batch, Method
from entrograd.methods.options import (
    NonNegative,
    RewardOptions,
    optional_columns,
    with_penalty,
)
from entrograd.numerics import aggregate
from entrograd.numerics.ratings import composed, weights


@dataclass(frozen=True)
class Params(RewardOptions, grpo.Params):
    """ENCORE's parameters, beside GRPO's and the overlong penalty's."""

    # w_k = exp(-H_k / tau) / sum_j exp(-H_j / tau); inf: uniform
    tau: Annotated[float, Field(gt=0)] = 2.0
    # the unit of H_k in the weights: e nats, 2 bits
    log_base: Annotated[float, Field(gt=1, allow_inf_nan=False)] = math.e
    # H_k in nats by head; empty: measured on the annotated data set before training
    entropies: dict[str, NonNegative] = field(default_factory=dict)


def head_weights(params: Params, head_names: tuple[str, ...]) -> Tensor:
    """[R] the weight of each head, in the order of `head_names`.

    Raises InputError where the entropies are not measured yet or name other heads.
    """
    if set(params.entropies) != set(head_names):
        raise InputError(
            f"params.yaml: method.encore.entropies: known for {sorted(params.entropies)}, but the "
            f"completions have the reward heads {sorted(head_names)}; leave it out to take what "
            "stage annotate measured of annotate.heads"
        )
    entropies = torch.tensor([params.entropies[name] for name in head_names], dtype=torch.float64)
    return weights(entropies / math.log(params.log_base), params.tau)


def weights_by_name(head_names: tuple[str, ...], params: Params) -> dict[str, float]:
    """The weight of each head, by name."""
    return dict(zip(head_names, head_weights(params, head_names).tolist(), strict=True))


def fit(entropies: Mapping[str, float], params: Params) -> Params:
    """`params` with the entropy of each head's ratings; as they are where given already."""
    return params if params.entropies else replace(params, entropies=dict(entropies))


def compose_rewards(batch: Batch, params: Params) -> Tensor:
    """[B] phi_i = sum_k w_k psi_{i,k}, plus the overlong penalty."""
    weight = head_weights(params, batch.head_names).tolist()
    return with_penalty(composed(batch.require("reward_heads"), weight), batch, params)


METHOD = Method(
    name="encore",
    params=Params,
    required_columns=frozenset({"reward_heads"}),
    advantages=grpo.advantages,
    policy_loss=grpo.policy_loss,
    aggregate=aggregate.sequence_mean,
    about="reward",
    compose_rewards=compose_rewards,
    fit=fit,
    loss_needs=optional_columns,
    head_weights=weights_by_name,
    paper="arXiv 2503.20995",
    equation="r_i = sum_k w_k psi_{i,k}, w = softmax(-H / tau); GRPO",
)
