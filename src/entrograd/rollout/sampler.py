"""Drawing tokens: one uniform number a token, and the inverse of the cumulative distribution."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from entrograd.params import Sampling


def uniforms(seed: int, prompt_id: str, sample_index: int, count: int) -> np.ndarray:
    """[count] float64 in [0, 1): the noise of one completion, by position.

    A function of its arguments alone (Philox keyed by their hash), so batch, order, shard and
    resume never change what is drawn; a longer `count` only continues the sequence.
    """
    digest = hashlib.sha256(f"{seed}\0{prompt_id}\0{sample_index}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.random(count)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-probability under the distribution really sampled from.

    Args:
        logits: [B, V] of the model.
        uniform: [B] float64 in [0, 1).
        sampling: temperature 0 takes the most likely token, whose log-probability is then 0.

    Returns:
        tokens [B] long; logprobs [B] float32, nats.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    scaled = filter_logits(logits.float() / sampling.temperature, sampling.top_k, sampling.top_p)
    logprobs = torch.log_softmax(scaled, -1)
    cumulative = logprobs.exp().double().cumsum(-1)
    point = uniform.to(cumulative.device) * cumulative[:, -1]
    tokens = torch.searchsorted(cumulative, point[:, None], right=True)[:, 0]
    tokens = tokens.clamp_max(logits.shape[-1] - 1)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """[B, V] with all but the `top_k` largest (0: all), then all but the smallest set of most
    likely tokens whose probability reaches `top_p`, at -inf. The most likely token stays."""
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits
