"""Probability ratios and the policy losses built on them. Losses are to be minimised.

rho_t = pi(o_t) / pi_old(o_t) = exp(logprobs - old_logprobs). Tensors are [B, T]; ratios are 1 at
padding and no gradient reaches it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from entrograd.numerics import masked

# exp(20) is about 5e8: a larger ratio overflows float32 gradients and says the policies are
# unrelated. Beyond it a token keeps the bounded value and gives no gradient.
LOG_RATIO_BOUND = 20.0


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B, T] log rho in nats, within +-LOG_RATIO_BOUND, 0 at padding."""
    difference = masked.fill(logprobs, mask) - masked.fill(old_logprobs, mask)
    return difference.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def token_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B, T] rho_t."""
    return log_ratio(logprobs, old_logprobs, mask).exp()


def geometric_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B, T] s_i = exp(mean_t log rho_t), with a token's own share of the gradient.

    s_{i,t} = sg(s_i) pi_t / sg(pi_t)  (arXiv 2507.18071, Eq. 14): the value of every token is s_i;
    where a completion has one advantage, loss and gradient are those of s_i itself (Eq. 7).
    """
    logs = log_ratio(logprobs, old_logprobs, mask)
    sequence = masked.means(logs, mask).exp()[:, None]
    return sequence.detach() * (logs - logs.detach()).exp()


def arithmetic_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B, T] w_i = mean_t rho_t (arXiv 2508.04349, Eq. 11), with a token's share of the gradient.

    w_{i,t} = sg(w_i) + rho_t - sg(rho_t): the value of every token is w_i; where a completion has
    one advantage, loss and gradient are those of w_i itself.
    """
    ratio = token_ratio(logprobs, old_logprobs, mask)
    return masked.means(ratio, mask)[:, None].detach() + ratio - ratio.detach()


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """[B, T] -min(rho A, clip(rho, 1 - low, 1 + high) A), the clipped surrogate as a loss."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def weighted_likelihood(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, high: float
) -> Tensor:
    """[B, T] -sg(min(rho, 1 + high)) A log pi (CISPO, arXiv 2506.13585, Eq. 4 and 5).

    No token is dropped: the clipped weight is a constant, the gradient goes through log pi.
    """
    weight = token_ratio(logprobs, old_logprobs, mask).clamp(max=1 + high).detach()
    return -weight * advantages * masked.fill(logprobs, mask)


def importance_weight(
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    mask: Tensor,
    *,
    kind: Literal["truncated", "masked"],
    level: Literal["token", "sequence"],
    cap: float,
) -> Tensor:
    """[B, T] weight for the mismatch between trainer and sampling engine, detached, 1 at padding.

    w = exp(old_logprobs - sampling_logprobs), of a token or the product over its completion.
    truncated: min(w, cap). masked: w, and 0 where w > cap.
    """
    logs = masked.fill(old_logprobs, mask) - masked.fill(sampling_logprobs, mask)
    if level == "sequence":
        logs = logs.sum(-1, keepdim=True).expand_as(logs)
    weight = logs.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().detach()
    weight = weight.clamp(max=cap) if kind == "truncated" else weight * (weight <= cap)
    return masked.fill(weight, mask, 1.0)
