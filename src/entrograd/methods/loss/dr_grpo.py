"""Dr.GRPO's loss (arXiv 2503.20783): GRPO's without the division by each completion's own length,
which favours long wrong ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from entrograd.methods.batch import Denominators
from entrograd.methods.loss import grpo
from entrograd.numerics import aggregate


@dataclass(frozen=True)
class DrGrpo(grpo.Grpo):
    """The clipped surrogate, summed and divided by a constant length."""

    name = "dr_grpo"
    paper = "arXiv 2503.20783"
    equation = "sum_{i,t} min(rho A, clip(rho, .8, 1.2) A) / (B L)"

    def aggregate(self, loss: Tensor, mask: Tensor, counts: Denominators) -> Tensor:
        """The sum over all tokens, divided by B L, L the longest completion allowed."""
        return aggregate.constant_length(loss, mask, counts)
