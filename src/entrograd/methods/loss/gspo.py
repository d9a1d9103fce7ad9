"""GSPO: group sequence policy optimisation (arXiv 2507.18071).

One importance ratio per completion, the geometric mean of its tokens' ratios, and a clip range two
orders of magnitude narrower than GRPO's. With advantages that vary between tokens it is the paper's
GSPO-token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from entrograd.methods.batch import Batch
from entrograd.methods.loss import grpo
from entrograd.methods.parameters import ClipLow, NonNegative
from entrograd.numerics.surrogate import geometric_ratio


@dataclass(frozen=True)
class Gspo(grpo.Grpo):
    """The clipped surrogate of the completion's geometric mean ratio (Eq. 5 and 7; 13 and 14)."""

    name = "gspo"
    paper = "arXiv 2507.18071"
    equation = "s_i = exp(mean_t log rho); mean_i min(s_i A_i, clip(s_i) A_i)"

    # Eq. 5: s_i clipped to [1 - clip_low, 1 + clip_high]
    clip_low: ClipLow = 3e-4
    clip_high: NonNegative = 4e-4

    def ratio(self, logprobs: Tensor, batch: Batch) -> Tensor:
        """[B, T] s_i = exp(mean_t log rho_t)."""
        return geometric_ratio(logprobs, batch.old_logprobs, batch.completion_mask)
