"""The graded reward alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from entrograd.methods.batch import Batch
from entrograd.methods.components import RewardComposer


@dataclass(frozen=True)
class Single(RewardComposer):
    """The reward as it was graded."""

    name = "single"
    paper = "arXiv 2402.03300; the penalty arXiv 2503.14476"
    equation = "r_i as graded"

    def composed(self, batch: Batch) -> Tensor:
        """[B] r_i."""
        return batch.rewards
