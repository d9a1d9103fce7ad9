"""Entropy of a reward head's ratings, and the weights it gives the heads (ENCORE, 2503.20995)."""

from __future__ import annotations

import torch
from torch import Tensor


def rating_entropy(ratings: Tensor) -> Tensor:
    """H_k = -sum_v p(v) ln p(v), nats, over the distinct values v of ratings [N]; float64."""
    counts = torch.unique(ratings.double(), return_counts=True)[1].double()
    return torch.special.entr(counts / counts.sum()).sum()


def weights(entropies: Tensor, tau: float) -> Tensor:
    """[R] w_k = exp(-H_k / tau) / sum_j exp(-H_j / tau), float64; tau inf: uniform."""
    return torch.softmax(-entropies.double() / tau, dim=-1)
