"""ENCORE: entropy-penalised composition of many reward heads (arXiv 2503.20995).

A rule whose ratings are spread over the whole scale tells little; a head's weight falls with the
entropy of its ratings over the annotated data set. The weights need no training and are the same
for every completion. ENCORE as the reward of reinforcement learning is this project's extension:
the paper weighs the heads of a reward model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor

from entrograd.errors import InputError
from entrograd.methods.batch import Batch
from entrograd.methods.components import RewardComposer
from entrograd.methods.parameters import NonNegative
from entrograd.numerics.ratings import composed, weights


@dataclass(frozen=True)
class Encore(RewardComposer):
    """A mean of the reward heads, weighted by the entropy of their ratings."""

    name = "encore"
    paper = "arXiv 2503.20995"
    equation = "r_i = sum_k w_k psi_{i,k}, w = softmax(-H / tau)"

    # w_k = exp(-H_k / tau) / sum_j exp(-H_j / tau); inf: uniform
    tau: Annotated[float, Field(gt=0)] = 2.0
    # the unit of H_k in the weights: e nats, 2 bits
    log_base: Annotated[float, Field(gt=1, allow_inf_nan=False)] = math.e
    # H_k in nats by head; empty: measured on the annotated data set before training
    entropies: dict[str, NonNegative] = field(default_factory=dict)

    @property
    def required_columns(self) -> frozenset[str]:
        """The reward heads."""
        return frozenset({"reward_heads"})

    def fitted(self, entropies: Mapping[str, float]) -> Self:
        """With the entropy of each head's ratings; as it is if they are given in params.yaml."""
        return self if self.entropies else replace(self, entropies=dict(entropies))

    def head_weights(self, names: tuple[str, ...]) -> Mapping[str, float]:
        """w_k of each head.

        Raises:
            InputError: the entropies are not measured yet or name other heads.
        """
        if set(self.entropies) != set(names):
            raise InputError(
                f"params.yaml: method.encore.entropies: known for {sorted(self.entropies)}, but "
                f"the completions have the reward heads {sorted(names)}; leave it out to take what "
                "stage annotate measured of annotate.heads"
            )
        entropies = torch.tensor([self.entropies[name] for name in names], dtype=torch.float64)
        fractions = weights(entropies / math.log(self.log_base), self.tau)
        return dict(zip(names, fractions.tolist(), strict=True))

    def composed(self, batch: Batch) -> Tensor:
        """[B] phi_i = sum_k w_k psi_{i,k}."""
        shares = self.head_weights(batch.head_names)
        return composed(batch.require("reward_heads"), list(shares.values()))
