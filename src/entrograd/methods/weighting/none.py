"""Every prompt counts the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entrograd.methods.batch import Batch
from entrograd.methods.components import PromptWeighting


@dataclass(frozen=True)
class Unweighted(PromptWeighting):
    """No weighting."""

    name = "none"
    paper = "arXiv 2402.03300"
    equation = "1"

    def weights(self, batch: Batch) -> Tensor:
        """[B] 1."""
        return torch.ones_like(batch.rewards)
