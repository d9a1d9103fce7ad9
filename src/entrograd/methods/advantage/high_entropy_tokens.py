"""High-entropy minority tokens (Wang et al., arXiv 2506.01939).

Only the most uncertain fraction of tokens is trained on: the advantage is zero at the others. The
cut is a quantile over all trained tokens of the optimiser batch, and the loss still divides by all
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from entrograd.methods.advantage import grpo
from entrograd.methods.batch import Batch
from entrograd.methods.parameters import UnitFraction
from entrograd.numerics import masked


@dataclass(frozen=True)
class HighEntropyTokens(grpo.Grpo):
    """GRPO's advantage at the tokens of highest entropy."""

    name = "high_entropy_tokens"
    paper = "arXiv 2506.01939"
    equation = "A_i [H_{i,t} >= (1 - fraction)-quantile]"

    # Eq. 5: tokens with H >= the (1 - fraction)-quantile are kept
    fraction: UnitFraction = 0.2

    @property
    def required_columns(self) -> frozenset[str]:
        """The token entropies."""
        return frozenset({"entropies"})

    def kept_tokens(self, batch: Batch) -> Tensor:
        """[B, T] bool: trained tokens with H_{i,t} >= the (1 - fraction)-quantile of the batch."""
        entropies, mask = batch.require("entropies").double(), batch.completion_mask
        return mask & (entropies >= masked.quantile(entropies, mask, 1 - self.fraction))

    def advantages(self, batch: Batch) -> Tensor:
        """[B, T] the standardised reward at the tokens kept, 0 elsewhere."""
        return super().advantages(batch) * self.kept_tokens(batch)

    def working(self, batch: Batch) -> Mapping[str, Tensor]:
        """Which tokens are kept."""
        return {"kept": self.kept_tokens(batch)}
