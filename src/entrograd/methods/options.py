"""What a choice offers beside its own formula, off by default: of every policy loss a penalty
towards a reference policy and a correction for completions sampled by another engine; of a reward
composition the penalty for long completions.

Also the parameter types the methods' dataclasses are written with, and which choice reads one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from entrograd.methods.base import Batch, Method
from entrograd.numerics import kl, masked, surrogate

Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
UnitFraction = Annotated[float, Field(gt=0, le=1)]
ClipLow = Annotated[float, Field(ge=0, le=1)]
Tokens = Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class LossOptions:
    """Options of a policy loss, part of every method's parameters."""

    # loss + kl_coefficient * KL_t(pi || pi_ref); needs ref_logprobs where above 0
    kl_coefficient: NonNegative = 0.0
    # k1: -d; k2: d^2/2; k3: exp(d) - d - 1, with d = log pi_ref - log pi
    kl_estimator: kl.Estimator = "k3"
    # weight w = exp(old_logprobs - sampling_logprobs): truncated min(w, cap), masked w*[w <= cap]
    importance_sampling: Literal["none", "truncated", "masked"] = "none"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    importance_sampling_cap: AboveZero = 2.0


def optional_columns(params: LossOptions) -> frozenset[str]:
    """The columns these options read."""
    columns = {"ref_logprobs": params.kl_coefficient > 0}
    columns["sampling_logprobs"] = params.importance_sampling != "none"
    return frozenset(name for name, used in columns.items() if used)


def with_options(loss: Tensor, logprobs: Tensor, batch: Batch, params: LossOptions) -> Tensor:
    """[B, T] w_t * loss_t + kl_coefficient * KL_t."""
    if params.importance_sampling != "none":
        loss = loss * surrogate.importance_weight(
            batch.old_logprobs,
            batch.require("sampling_logprobs"),
            batch.completion_mask,
            kind=params.importance_sampling,
            level=params.importance_sampling_level,
            cap=params.importance_sampling_cap,
        )
    if params.kl_coefficient > 0:
        mask = batch.completion_mask
        current = masked.fill(logprobs, mask)
        reference = masked.fill(batch.require("ref_logprobs"), mask)
        loss = loss + params.kl_coefficient * kl.estimate(params.kl_estimator, current, reference)
    return loss


@dataclass(frozen=True)
class RewardOptions:
    """Options of a reward composition: DAPO's soft penalty for long completions (its Eq. 13)."""

    # Lmax, the length from which the penalty is -1 (DAPO: 20480); null: no penalty
    overlong_length: Tokens | None = None
    # Lc, the length over which it rises (DAPO: 4096)
    overlong_buffer: Tokens = 4096

    def __post_init__(self) -> None:
        if self.overlong_length is not None and self.overlong_buffer > self.overlong_length:
            raise ValueError(
                f"overlong_buffer ({self.overlong_buffer}) must not exceed overlong_length "
                f"({self.overlong_length})"
            )


def overlong_penalty(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """[B] 0 up to Lmax - Lc, then linear to -1 at Lmax, -1 beyond (arXiv 2503.14476, Eq. 13),
    float64.

    Args:
        lengths: [B] tokens; longest: Lmax; buffer: Lc.
    """
    return ((longest - buffer - lengths.double()) / buffer).clamp(min=-1.0, max=0.0)


def with_penalty(rewards: Tensor, batch: Batch, params: RewardOptions) -> Tensor:
    """[B] composed rewards plus the overlong penalty, as the batch's rewards are stored."""
    if params.overlong_length is not None:
        longest, buffer = params.overlong_length, params.overlong_buffer
        rewards = rewards.double() + overlong_penalty(batch.lengths, longest, buffer)
    return rewards.to(batch.rewards.dtype)


# The choice that reads a parameter of one of these names, whatever the method.
_READ_BY = {
    "epsilon": "credit",
    **dict.fromkeys(("clip_low", "clip_high", *(f.name for f in fields(LossOptions))), "loss"),
    **dict.fromkeys((f.name for f in fields(RewardOptions)), "reward"),
}


def read_by(method: Method, parameter: str) -> str:
    """The choice that reads a parameter of `method`: told by its name, else what it is about."""
    return _READ_BY.get(parameter, method.about)
