"""GRPO: group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300).

A completion's advantage is its reward standardised within its group; every token gets it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from entrograd.methods.batch import Batch
from entrograd.methods.components import AdvantageEstimator
from entrograd.methods.parameters import NonNegative
from entrograd.numerics import groups


@dataclass(frozen=True)
class Grpo(AdvantageEstimator):
    """The standardised reward."""

    name = "grpo"
    paper = "arXiv 2402.03300"
    equation = "A_i = (r_i - mean r) / (std r + 1e-4)"

    # A_i = (r_i - mean r) / (s + epsilon), s the sample standard deviation (over n - 1)
    epsilon: NonNegative = 1e-4

    def advantages(self, batch: Batch) -> Tensor:
        """[B, T] A_i = (r_i - mean r) / (s + epsilon) at every token; 0 if rewards are equal."""
        return batch.to_tokens(
            groups.zscore(batch.rewards, batch.groups, self.epsilon, sample=True)
        )
