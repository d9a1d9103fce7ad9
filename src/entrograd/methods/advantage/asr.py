"""ASR: adaptive segment-level reward (arXiv 2411.00809v3). An approximation: the paper's exact
rule is not public to us.

A completion is cut where its token scores jump or cross the baseline; a segment whose mean score
disagrees with the sign of the completion's advantage is left out of the loss, penalties included,
and of what the loss divides by. Two neighbours are offered as other ways to cut: every token a
segment of its own, and a cut after each token of high entropy (arXiv 2501.02790). The advantage is
GRPO's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from entrograd.methods.advantage import grpo
from entrograd.methods.batch import Batch
from entrograd.methods.parameters import Finite, NonNegative
from entrograd.numerics.segments import change_segments, entropy_segments, segment_means


def kept_tokens(scores: Tensor, advantages: Tensor, mask: Tensor, baseline: float) -> Tensor:
    """[B, T] bool: sign(score - baseline) = sign(advantage); a score at the baseline never is."""
    side = (scores - baseline).sign()
    return mask & (side == advantages.sign()) & (side != 0)


@dataclass(frozen=True)
class Asr(grpo.Grpo):
    """GRPO's advantage at the segments that agree with its sign."""

    name = "asr"
    paper = "arXiv 2411.00809v3 (an approximation)"
    equation = "A_i [sign(mean score of t's segment - b) = sign(A_i)]"

    # token score v_t: implicit_reward beta (log pi_old - log pi_ref); entropy H_t (nats);
    # reward_model, a token-level head (column token_scores)
    source: Literal["implicit_reward", "entropy", "reward_model"] = "implicit_reward"
    beta: NonNegative = 0.1
    # change: cut where |v_t - v_{t-1}| > delta or sign(v_t - baseline) changes; token: everywhere;
    # entropy_cutoff: after each token with H > cutoff; stored: the column segment_ids
    segmentation: Literal["change", "token", "entropy_cutoff", "stored"] = "change"
    delta: NonNegative = 0.1
    baseline: Finite = 0.0
    min_length: Annotated[int, Field(gt=0)] = 3
    cutoff: NonNegative = 1.75
    # false: masked tokens leave the loss and what it divides by; true: their advantage alone is 0
    keep_denominator: bool = False

    @property
    def required_columns(self) -> frozenset[str]:
        """What the token scores and the segmentation read."""
        columns = {
            "implicit_reward": {"old_logprobs", "ref_logprobs"},
            "entropy": {"entropies"},
            "reward_model": {"token_scores"},
        }[self.source]
        cuts = {"entropy_cutoff": {"entropies"}, "stored": {"segment_ids"}}
        return frozenset(columns | cuts.get(self.segmentation, set()))

    def token_scores(self, batch: Batch) -> Tensor:
        """[B, T] v_t, float64, 0 at padding."""
        if self.source == "implicit_reward":
            reference = batch.require("ref_logprobs").double()
            scores = self.beta * (batch.old_logprobs.double() - reference)
        else:
            column = "entropies" if self.source == "entropy" else "token_scores"
            scores = batch.require(column).double()
        return torch.where(batch.completion_mask, scores, 0.0)

    def segments(self, batch: Batch) -> Tensor:
        """[B, T] long, the number of each token's segment, cut as `segmentation` says."""
        mask = batch.completion_mask
        if self.segmentation == "token":
            return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        if self.segmentation == "entropy_cutoff":
            return entropy_segments(batch.require("entropies"), mask, self.cutoff)
        if self.segmentation == "stored":
            return batch.require("segment_ids")
        scores = self.token_scores(batch)
        return change_segments(scores, mask, self.delta, self.baseline, self.min_length)

    def working(self, batch: Batch) -> Mapping[str, Tensor]:
        """Each token's score, the number and the mean score of its segment, and whether it is
        kept."""
        mask, cuts = batch.completion_mask, self.segments(batch)
        scores = self.token_scores(batch)
        means = segment_means(scores, mask, cuts)
        kept = kept_tokens(means, super().advantages(batch), mask, self.baseline)
        return {"token_scores": scores, "segments": cuts, "segment_scores": means, "kept": kept}

    def advantages(self, batch: Batch) -> Tensor:
        """[B, T] GRPO's advantages at the tokens kept, 0 elsewhere."""
        return super().advantages(batch) * self.working(batch)["kept"]

    def loss_mask(self, batch: Batch) -> Tensor:
        """[B, T] bool, the tokens kept; every token with `keep_denominator`, and of a completion
        without an advantage, whose tokens have nothing to agree with."""
        if self.keep_denominator:
            return batch.completion_mask
        unsigned = super().advantages(batch) == 0
        return batch.completion_mask & (self.working(batch)["kept"] | unsigned)
