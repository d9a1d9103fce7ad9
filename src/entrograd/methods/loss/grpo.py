"""GRPO's loss: PPO's clipped surrogate, the mean over a completion's tokens, then over completions
(DeepSeekMath, arXiv 2402.03300). Losses that clip another ratio, or add up otherwise, build on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from entrograd.methods.batch import Batch, Denominators
from entrograd.methods.components import PolicyLoss
from entrograd.methods.parameters import ClipLow, NonNegative
from entrograd.numerics import aggregate, surrogate


@dataclass(frozen=True)
class Grpo(PolicyLoss):
    """The clipped surrogate of the token's ratio."""

    name = "grpo"
    paper = "arXiv 2402.03300"
    equation = "mean_i mean_t min(rho A, clip(rho, .8, 1.2) A)"

    # Eq. 3: the ratio clipped to [1 - clip_low, 1 + clip_high]
    clip_low: ClipLow = 0.2
    clip_high: NonNegative = 0.2

    def ratio(self, logprobs: Tensor, batch: Batch) -> Tensor:
        """[B, T] the ratio that is clipped: rho_t."""
        return surrogate.token_ratio(logprobs, batch.old_logprobs, batch.completion_mask)

    def surrogate(self, logprobs: Tensor, advantages: Tensor, batch: Batch) -> Tensor:
        """[B, T] -min(rho A, clip(rho) A) (Eq. 3)."""
        ratio = self.ratio(logprobs, batch)
        return surrogate.clipped(ratio, advantages, self.clip_low, self.clip_high)

    def aggregate(self, loss: Tensor, mask: Tensor, counts: Denominators) -> Tensor:
        """The mean over completions of the mean over their tokens."""
        return aggregate.sequence_mean(loss, mask, counts)

    def clipped(self, logprobs: Tensor, advantages: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """clip_low, clip_high: tokens that give no gradient, since their ratio is below (above) its
        bound while the advantage is negative (positive)."""
        ratio = self.ratio(logprobs, batch)
        return {
            "clip_low": (ratio < 1 - self.clip_low) & (advantages < 0),
            "clip_high": (ratio > 1 + self.clip_high) & (advantages > 0),
        }
