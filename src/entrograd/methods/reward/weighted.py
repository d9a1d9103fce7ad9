"""Weighted composition: a fixed weight for each reward head.

The plain alternative to ENCORE's weights. The word `reward` among the weights is the graded reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from entrograd.errors import InputError
from entrograd.methods.batch import Batch
from entrograd.methods.components import RewardComposer
from entrograd.methods.parameters import Finite
from entrograd.numerics.ratings import composed


@dataclass(frozen=True)
class Weighted(RewardComposer):
    """A sum of the graded reward and the reward heads with fixed weights."""

    name = "weighted"
    paper = "fixed weights; the plain baseline of arXiv 2503.20995"
    equation = "r_i = sum_k w_k psi_{i,k}, w fixed"

    # r_i = sum_k weights[k] psi_{i,k}; a head that is not named weighs 0
    weights: dict[str, Finite] = field(default_factory=lambda: {"reward": 1.0})

    @property
    def required_columns(self) -> frozenset[str]:
        """The reward heads, if any is weighed."""
        return frozenset({"reward_heads"} if set(self.weights) - {"reward"} else ())

    def head_weights(self, names: tuple[str, ...]) -> Mapping[str, float]:
        """The weight of the graded reward and of each head."""
        return {name: self.weights.get(name, 0.0) for name in ("reward", *names)}

    def composed(self, batch: Batch) -> Tensor:
        """[B] sum_k w_k psi_{i,k}, `reward` standing for the graded reward.

        Raises:
            InputError: a weight is for a head that the batch does not have.
        """
        heads = {"reward": batch.rewards}
        for name in self.weights:
            if name == "reward":
                continue
            if name not in batch.head_names:
                raise InputError(
                    f"params.yaml: method.weighted.weights.{name}: no such reward head; there are "
                    f"{', '.join(('reward', *batch.head_names))}"
                )
            heads[name] = batch.require("reward_heads")[:, batch.head_names.index(name)]
        columns = torch.stack([column.double() for column in heads.values()], -1)
        return composed(columns, [self.weights.get(name, 0.0) for name in heads])
