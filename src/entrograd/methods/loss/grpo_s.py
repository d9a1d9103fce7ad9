"""GRPO-S's loss (Tan, Pan et al., arXiv 2508.04349): the ratio of a completion is the arithmetic
mean of its tokens'."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from entrograd.methods.batch import Batch
from entrograd.methods.loss import grpo
from entrograd.methods.parameters import NonNegative
from entrograd.numerics.surrogate import arithmetic_ratio


@dataclass(frozen=True)
class GrpoS(grpo.Grpo):
    """The clipped surrogate of the completion's arithmetic mean ratio (Eq. 10 and 11)."""

    name = "grpo_s"
    paper = "arXiv 2508.04349"
    equation = "w_i = mean_t rho; mean_i min(w_i A_i, clip(w_i, .8, 1.28) A_i)"

    # Eq. 10: w_i clipped to [1 - clip_low, 1 + clip_high]
    clip_high: NonNegative = 0.28

    def ratio(self, logprobs: Tensor, batch: Batch) -> Tensor:
        """[B, T] w_i = mean_t rho_t."""
        return arithmetic_ratio(logprobs, batch.old_logprobs, batch.completion_mask)
