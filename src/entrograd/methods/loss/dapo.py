"""DAPO's loss (arXiv 2503.14476): GRPO's with a wider upper clip, and the mean over all tokens of
the batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from entrograd.methods.batch import Denominators
from entrograd.methods.loss import grpo
from entrograd.methods.parameters import NonNegative
from entrograd.numerics import aggregate


@dataclass(frozen=True)
class Dapo(grpo.Grpo):
    """The clipped surrogate with a wider upper clip, each token counting the same."""

    name = "dapo"
    paper = "arXiv 2503.14476"
    equation = "sum_{i,t} min(rho A, clip(rho, .8, 1.28) A) / sum_i |o_i|"

    # Eq. 8: rho clipped to [1 - clip_low, 1 + clip_high]
    clip_high: NonNegative = 0.28

    def aggregate(self, loss: Tensor, mask: Tensor, counts: Denominators) -> Tensor:
        """The mean over all tokens of the batch."""
        return aggregate.token_mean(loss, mask, counts)
