"""ENCORE: entropy-penalised composition of many reward heads (arXiv 2503.20995).

A rule whose ratings are spread over the whole scale tells little; a head's weight falls with the
entropy of its ratings over the annotated data set. The weights need no training and are the same
for every completion. Credit and loss are GRPO's: ENCORE as the reward of reinforcement learning is
this project's extension, the paper weighs the heads of a reward model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from entrograd.errors import InputError
from entrograd.methods import grpo
from entrograd.methods.base import Batch, Method
from entrograd.methods.options import NonNegative, optional_columns
from entrograd.numerics import aggregate


@dataclass(frozen=True)
class Params(grpo.Params):
    """ENCORE's parameters, beside those of GRPO."""

    # w_k = exp(-H_k / tau) / sum_j exp(-H_j / tau); inf: uniform
    tau: Annotated[float, Field(gt=0)] = 2.0
    # the unit of H_k in the weights: e nats, 2 bits
    log_base: Annotated[float, Field(gt=1, allow_inf_nan=False)] = math.e
    # H_k in nats by head; empty: measured on the annotated data set before training
    entropies: dict[str, NonNegative] = field(default_factory=dict)


def rating_entropy(ratings: Tensor) -> Tensor:
    """H_k = -sum_v p(v) ln p(v), nats, over the distinct values v of ratings [N]; float64."""
    counts = torch.unique(ratings.double(), return_counts=True)[1].double()
    return torch.special.entr(counts / counts.sum()).sum()


def weights(entropies: Tensor, tau: float) -> Tensor:
    """[R] w_k = exp(-H_k / tau) / sum_j exp(-H_j / tau), float64."""
    return torch.softmax(-entropies.double() / tau, dim=-1)


def head_weights(params: Params, head_names: tuple[str, ...]) -> Tensor:
    """[R] the weight of each head, in the order of `head_names`.

    Raises InputError where the entropies are not measured yet or name other heads.
    """
    if set(params.entropies) != set(head_names):
        raise InputError(
            f"params.yaml: method.encore.entropies: holds {sorted(params.entropies)}, but the "
            f"completions have the heads {sorted(head_names)}; leave it out to have the entropies "
            "measured on the annotated data set"
        )
    entropies = torch.tensor([params.entropies[name] for name in head_names], dtype=torch.float64)
    return weights(entropies / math.log(params.log_base), params.tau)


def fit(reward_heads: Tensor, head_names: tuple[str, ...], params: Params) -> Params:
    """`params` with the entropy of each head's ratings [N, R]; as they are where given already."""
    if params.entropies:
        return params
    columns = zip(head_names, reward_heads.T, strict=True)
    return replace(params, entropies={name: float(rating_entropy(r)) for name, r in columns})


def compose_rewards(batch: Batch, params: Params) -> Tensor:
    """[B] phi_i = sum_k w_k psi_{i,k}."""
    heads = batch.require("reward_heads").double()
    weight = head_weights(params, batch.head_names).to(heads.device)
    return (heads @ weight).to(batch.rewards.dtype)


METHOD = Method(
    name="encore",
    params=Params,
    needs=frozenset({"reward_heads"}),
    advantages=grpo.advantages,
    policy_loss=grpo.policy_loss,
    aggregate=aggregate.sequence_mean,
    compose_rewards=compose_rewards,
    fit=fit,
    loss_needs=optional_columns,
    paper="arXiv 2503.20995",
    equation="r_i = sum_k w_k psi_{i,k}, w = softmax(-H / tau); GRPO",
)
