"""Dr.GRPO: GRPO done right (arXiv 2503.20783).

GRPO without the division by the group's standard deviation, which weighs prompts by difficulty.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from entrograd.methods.batch import Batch
from entrograd.methods.components import AdvantageEstimator
from entrograd.numerics import groups


@dataclass(frozen=True)
class DrGrpo(AdvantageEstimator):
    """The reward above the group's mean."""

    name = "dr_grpo"
    paper = "arXiv 2503.20783"
    equation = "A_i = r_i - mean r"

    def advantages(self, batch: Batch) -> Tensor:
        """[B, T] A_i = r_i - mean r at every token; 0 if rewards are equal."""
        return batch.to_tokens(groups.centered(batch.rewards, batch.groups))
