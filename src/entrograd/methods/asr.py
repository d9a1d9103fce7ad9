"""ASR: adaptive segment-level reward (arXiv 2411.00809v3). An approximation: the paper's exact
rule is not public to us.

A completion is cut where its token scores jump or cross the baseline; a segment whose mean score
disagrees with the sign of the completion's advantage is left out of the loss, penalties included,
and of what the loss divides by. Two neighbours are offered as other ways to cut: every token a
segment of its own, and a cut after each token of high entropy (arXiv 2501.02790). Advantage and
loss are GRPO's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from entrograd.methods import grpo
from entrograd.methods.base import Batch, Method
from entrograd.methods.options import Finite, NonNegative, optional_columns
from entrograd.numerics import aggregate
from entrograd.numerics.segments import change_segments, entropy_segments, segment_means


@dataclass(frozen=True)
class Params(grpo.Params):
    """ASR's parameters, beside those of GRPO."""

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


def token_scores(batch: Batch, params: Params) -> Tensor:
    """[B, T] v_t, float64, 0 at padding."""
    if params.source == "implicit_reward":
        reference = batch.require("ref_logprobs").double()
        scores = params.beta * (batch.old_logprobs.double() - reference)
    else:
        column = "entropies" if params.source == "entropy" else "token_scores"
        scores = batch.require(column).double()
    return torch.where(batch.completion_mask, scores, 0.0)


def segments(batch: Batch, params: Params) -> Tensor:
    """[B, T] long, the number of each token's segment, cut as `segmentation` says."""
    mask = batch.completion_mask
    if params.segmentation == "token":
        return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    if params.segmentation == "entropy_cutoff":
        return entropy_segments(batch.require("entropies"), mask, params.cutoff)
    if params.segmentation == "stored":
        return batch.require("segment_ids")
    scores = token_scores(batch, params)
    return change_segments(scores, mask, params.delta, params.baseline, params.min_length)


def kept_tokens(scores: Tensor, advantages: Tensor, mask: Tensor, baseline: float) -> Tensor:
    """[B, T] bool: sign(score - baseline) = sign(advantage); a score at the baseline never is."""
    side = (scores - baseline).sign()
    return mask & (side == advantages.sign()) & (side != 0)


def working(batch: Batch, params: Params) -> dict[str, Tensor]:
    """Each token's score, the number and the mean score of its segment, and whether it is kept."""
    mask, cuts = batch.completion_mask, segments(batch, params)
    scores = token_scores(batch, params)
    means = segment_means(scores, mask, cuts)
    kept = kept_tokens(means, grpo.advantages(batch, params), mask, params.baseline)
    return {"token_scores": scores, "segments": cuts, "segment_scores": means, "kept": kept}


def advantages(batch: Batch, params: Params) -> Tensor:
    """[B, T] GRPO's advantages at the tokens kept, 0 elsewhere."""
    return grpo.advantages(batch, params) * working(batch, params)["kept"]


def loss_mask(batch: Batch, params: Params) -> Tensor:
    """[B, T] bool, the tokens kept; every token with `keep_denominator`, and of a completion
    without an advantage, whose tokens have nothing to agree with."""
    if params.keep_denominator:
        return batch.completion_mask
    unsigned = grpo.advantages(batch, params) == 0
    return batch.completion_mask & (working(batch, params)["kept"] | unsigned)


def needs(params: Params) -> frozenset[str]:
    """What the token scores and the segmentation read."""
    source = {"implicit_reward": "ref_logprobs", "entropy": "entropies"}
    columns = {source.get(params.source, "token_scores")}
    if params.source == "implicit_reward":
        columns.add("old_logprobs")
    if params.segmentation == "entropy_cutoff":
        columns.add("entropies")
    if params.segmentation == "stored":
        columns.add("segment_ids")
    return frozenset(columns)


METHOD = Method(
    name="asr",
    params=Params,
    advantages=advantages,
    policy_loss=grpo.policy_loss,
    aggregate=aggregate.sequence_mean,
    needs_for=needs,
    loss_mask=loss_mask,
    loss_needs=optional_columns,
    working=working,
    paper="arXiv 2411.00809v3 (an approximation)",
    equation="keep t iff sign(mean score of its segment - b) = sign(A_i); GRPO",
)
