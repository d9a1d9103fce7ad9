"""Entropy of a reward head's ratings, the weights it gives the heads, and the reward composed of
them (ENCORE, arXiv 2503.20995)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rating_entropy(ratings: Tensor) -> Tensor:
    """H_k = -sum_v p(v) ln p(v), nats, over the distinct values v of ratings [N]; float64."""
    counts = torch.unique(ratings.double(), return_counts=True)[1].double()
    return torch.special.entr(counts / counts.sum()).sum()


def weights(entropies: Tensor, tau: float) -> Tensor:
    """[R] w_k = exp(-H_k / tau) / sum_j exp(-H_j / tau), float64; tau inf: uniform."""
    return torch.softmax(-entropies.double() / tau, dim=-1)


def composed(heads: Tensor, weights: Sequence[float]) -> Tensor:
    """[B] sum_k w_k psi_k of heads psi [B, R], float64.

    A product and a sum at a time: completions that are rated alike get the same reward to the bit,
    which a matrix product does not promise.
    """
    total = torch.zeros(len(heads), dtype=torch.float64, device=heads.device)
    for head, weight in zip(heads.double().unbind(-1), weights, strict=True):
        total = total + weight * head
    return total
