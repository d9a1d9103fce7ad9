"""EMPO: entropy-minimised policy optimisation (arXiv 2504.05812).

No labels: a completion's reward is the share of its group that gives the same answer, which
drives semantic entropy down. An empty answer earns 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entrograd.methods import grpo
from entrograd.methods.base import Batch, Method
from entrograd.methods.options import RewardOptions, optional_columns, with_penalty
from entrograd.numerics import aggregate
from entrograd.numerics.semantic_entropy import cluster_shares


@dataclass(frozen=True)
class Params(RewardOptions, grpo.Params):
    """EMPO's parameters: those of GRPO, whose advantage and loss it uses, and the overlong
    penalty's."""


def compose_rewards(batch: Batch, params: Params) -> Tensor:
    """[B] r_i = n_k / G, the share of completion i's cluster; 0 without an answer; plus the
    overlong penalty."""
    once = torch.ones_like(batch.rewards)
    share = cluster_shares(once, batch.groups, batch.require("cluster_ids"))
    return with_penalty(torch.where(batch.require("answered"), share, 0.0), batch, params)


METHOD = Method(
    name="empo",
    params=Params,
    required_columns=frozenset({"cluster_id"}),
    advantages=grpo.advantages,
    policy_loss=grpo.policy_loss,
    aggregate=aggregate.sequence_mean,
    about="reward",
    compose_rewards=compose_rewards,
    loss_needs=optional_columns,
    label_free=True,
    paper="arXiv 2504.05812",
    equation="r_i = n_k / G, the share of i's answer in its group; GRPO",
)
