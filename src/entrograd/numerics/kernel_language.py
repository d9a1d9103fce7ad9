"""Kernel language entropy of a graph of answers, in nats and float64 (arXiv 2405.20003)."""

from __future__ import annotations

import math

import numpy as np


def heat_kernel_eigenvalues(weights: np.ndarray, t: float = 0.3) -> np.ndarray:
    """[G] the eigenvalues, rising, of the heat kernel exp(-t L) of the answer graph scaled to unit
    trace, L its Laplacian (arXiv 2405.20003).

    `weights` [G, G] is symmetric and non-negative, 0 on the diagonal.
    """
    laplacian = np.diag(weights.sum(-1)) - weights
    kernel = np.exp(-t * np.linalg.eigvalsh(laplacian))
    return kernel[::-1] / kernel.sum()


def kernel_language(weights: np.ndarray, t: float = 0.3) -> float:
    """-sum_i lambda_i ln lambda_i over the eigenvalues above (kernel language entropy).

    Bounded by ln G, which a graph without edges reaches; the more the completions say the same,
    the smaller.
    """
    shares = heat_kernel_eigenvalues(weights, t)
    return -math.fsum(p * math.log(p) for p in shares.tolist() if p > 0) + 0.0
