"""CISPO: clipped importance-sampling policy optimisation (MiniMax-M1, arXiv 2506.13585).

The ratio is clipped and taken as a constant weight of log pi, so no token ever loses its
gradient. The clip is an upper one only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from entrograd.methods.batch import Batch, Denominators
from entrograd.methods.components import PolicyLoss
from entrograd.methods.parameters import NonNegative
from entrograd.numerics import aggregate, surrogate


@dataclass(frozen=True)
class Cispo(PolicyLoss):
    """The likelihood of each token, weighted by its clipped ratio."""

    name = "cispo"
    paper = "arXiv 2506.13585"
    equation = "-sg(min(rho, 1 + clip_high)) A log pi, over all tokens"

    # Eq. 5: weight min(rho, 1 + clip_high)
    clip_high: NonNegative = 4.0

    def surrogate(self, logprobs: Tensor, advantages: Tensor, batch: Batch) -> Tensor:
        """[B, T] -sg(min(rho, 1 + clip_high)) A log pi (Eq. 4 and 5)."""
        return surrogate.weighted_likelihood(
            logprobs, batch.old_logprobs, advantages, batch.completion_mask, self.clip_high
        )

    def aggregate(self, loss: Tensor, mask: Tensor, counts: Denominators) -> Tensor:
        """The mean over all tokens of the batch."""
        return aggregate.token_mean(loss, mask, counts)

    def clipped(self, logprobs: Tensor, advantages: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """weight_capped: tokens with an advantage whose weight is the bound; they keep their
        gradient."""
        ratio = surrogate.token_ratio(logprobs, batch.old_logprobs, batch.completion_mask)
        return {"weight_capped": (ratio > 1 + self.clip_high) & (advantages != 0)}
