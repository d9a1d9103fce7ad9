"""What every policy loss offers beside its own formula: a penalty towards a reference policy, and
a correction for completions sampled by another engine. Both are off by default.

Also the parameter types the methods' dataclasses are written with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from entrograd.methods.base import Batch
from entrograd.numerics import kl, masked, surrogate

Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
UnitShare = Annotated[float, Field(gt=0, le=1)]
ClipLow = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class LossOptions:
    """Options of a policy loss, part of every method's parameters."""

    # loss + kl_coefficient * KL_t(pi || pi_ref); needs ref_logprobs where above 0
    kl_coefficient: NonNegative = 0.0
    # k1: -d; k2: d^2/2; k3: exp(d) - d - 1, with d = log pi_ref - log pi
    kl_estimator: kl.Estimator = "k3"
    # weight w = exp(old_logprobs - sampling_logprobs): truncated min(w, cap), masked w*[w <= cap]
    correction: Literal["none", "truncated", "masked"] = "none"
    correction_level: Literal["token", "sequence"] = "token"
    correction_cap: AboveZero = 2.0


def optional_columns(params: LossOptions) -> frozenset[str]:
    """The columns these options read."""
    columns = {"ref_logprobs": params.kl_coefficient > 0}
    columns["sampling_logprobs"] = params.correction != "none"
    return frozenset(name for name, used in columns.items() if used)


def with_options(loss: Tensor, logprobs: Tensor, batch: Batch, params: LossOptions) -> Tensor:
    """[B, T] w_t * loss_t + kl_coefficient * KL_t."""
    if params.correction != "none":
        loss = loss * surrogate.correction_weight(
            batch.old_logprobs,
            batch.require("sampling_logprobs"),
            batch.completion_mask,
            kind=params.correction,
            level=params.correction_level,
            cap=params.correction_cap,
        )
    if params.kl_coefficient > 0:
        mask = batch.completion_mask
        current = masked.fill(logprobs, mask)
        reference = masked.fill(batch.require("ref_logprobs"), mask)
        loss = loss + params.kl_coefficient * kl.estimate(params.kl_estimator, current, reference)
    return loss
