"""Estimators of KL(pi || pi_ref) from the logprobs of sampled tokens, in nats, a token each.

With d = log pi_ref - log pi (Schulman, "Approximating KL divergence"; k3 is GRPO's Eq. 4, arXiv
2402.03300). k1 and k3 are unbiased as values; as a loss term only k2 has the gradient of the KL.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from entrograd.numerics.surrogate import LOG_RATIO_BOUND

Estimator = Literal["k1", "k2", "k3"]


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[...] -d: unbiased, of either sign."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[...] d^2 / 2: biased, never negative."""
    return (ref_logprobs - logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[...] exp(d) - d - 1: unbiased, never negative; d is bounded as log-ratios are."""
    d = (ref_logprobs - logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return d.exp() - d - 1


def estimate(name: Estimator, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[...] the estimator of that name."""
    return {"k1": k1, "k2": k2, "k3": k3}[name](logprobs, ref_logprobs)
