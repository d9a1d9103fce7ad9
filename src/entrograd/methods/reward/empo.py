"""EMPO: entropy-minimised policy optimisation (arXiv 2504.05812).

No labels: a completion's reward is the share of its group that gives the same answer, which
drives semantic entropy down. An empty answer earns 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entrograd.methods.batch import Batch
from entrograd.methods.components import RewardComposer
from entrograd.numerics.semantic_entropy import cluster_shares


@dataclass(frozen=True)
class Empo(RewardComposer):
    """The share of the group that gives the same answer."""

    name = "empo"
    paper = "arXiv 2504.05812"
    equation = "r_i = n_k / G, the share of i's answer in its group; 0 without an answer"
    label_free = True

    @property
    def required_columns(self) -> frozenset[str]:
        """The answer clusters."""
        return frozenset({"cluster_id"})

    def composed(self, batch: Batch) -> Tensor:
        """[B] r_i = n_k / G, the share of completion i's cluster; 0 without an answer."""
        once = torch.ones_like(batch.rewards)
        share = cluster_shares(once, batch.groups, batch.require("cluster_ids"))
        return torch.where(batch.require("answered"), share, 0.0)
