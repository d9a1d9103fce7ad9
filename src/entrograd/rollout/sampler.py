"""Drawing tokens: one uniform number per token, and the inverse of the cumulative distribution."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from entrograd.rollout.params import Sampling


BLOCK = 256  # tokens of the vocabulary summed together


def uniforms(seed: int, prompt_id: str, sample_index: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1): the noise of one completion, by position.

    A function of its arguments alone (Philox keyed by their hash), so batch, order, shard and
    resume never change what is drawn; a longer `count` only continues the sequence.
    """
    digest = hashlib.sha256(f"{seed}\0{prompt_id}\0{sample_index}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.random(count)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-probability under the distribution really sampled from.

    Args:
        logits: [B, V] of the model.
        uniform: [B] float64 in [0, 1).
        sampling: temperature 0 takes the most likely token, whose log-probability is then 0.

    Returns:
        tokens [B] long; logprobs [B] float32, nats.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    scaled = filter_logits(logits.float() / sampling.temperature, sampling)
    largest = scaled.amax(-1, keepdim=True)
    tokens, total = invert_cumulative((scaled - largest).exp_(), uniform)
    chosen = scaled.gather(-1, tokens[:, None]) - largest
    return tokens, (chosen[:, 0].double() - total.log()).float()


def invert_cumulative(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """[B] the first token whose cumulative weight exceeds `uniform` times the row's total, and
    [B] float64 that total.

    First over sums of blocks of tokens, then within the block where the point falls, both in
    float64: one pass over the vocabulary, and a token of weight 0 is never taken.

    Args:
        weights: [B, V], not negative, not all 0 in a row.
        uniform: [B] float64 in [0, 1).
    """
    spare = -weights.shape[-1] % BLOCK
    padded = torch.nn.functional.pad(weights, (0, spare)) if spare else weights
    blocks = padded.unflatten(-1, (-1, BLOCK))
    ends = blocks.sum(-1).double().cumsum(-1)
    point = uniform.to(ends.device)[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, point, right=True).clamp_max(ends.shape[-1] - 1)
    before = torch.where(block > 0, ends.gather(-1, (block - 1).clamp_min(0)), 0.0)
    row = torch.arange(len(weights), device=weights.device)
    within = blocks[row, block[:, 0]].double().cumsum(-1)
    place = torch.searchsorted(within, point - before, right=True)[:, 0]
    last = (blocks[row, block[:, 0]] > 0).long().mul(torch.arange(BLOCK, device=row.device))
    return block[:, 0] * BLOCK + torch.minimum(place, last.amax(-1)), ends[:, -1]


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """[B, V] with -inf at all but the `top_k` largest (0: all), then all but the smallest set of
    most likely tokens whose probability reaches `top_p`, then all whose probability is below
    `min_p` times the largest. The most likely token stays."""
    top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if min_p > 0:
        least = logits.amax(-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits
