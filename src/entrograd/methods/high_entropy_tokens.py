"""High-entropy minority tokens (Wang et al., arXiv 2506.01939).

Only the most uncertain share of tokens is trained on: the advantage is zero at the others. The
cut is a quantile over all trained tokens of the optimiser batch, and the loss still divides by all
tokens. The rest is DAPO, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from entrograd.methods import grpo
from entrograd.methods.base import Batch, Method
from entrograd.methods.options import NonNegative, UnitFraction, optional_columns
from entrograd.numerics import aggregate, masked


@dataclass(frozen=True)
class Params(grpo.Params):
    """Parameters of the high-entropy mask, beside those of GRPO."""

    # Eq. 5: tokens with H >= the (1 - share)-quantile are kept
    share: UnitFraction = 0.2
    # DAPO's upper clip
    clip_high: NonNegative = 0.28


def kept_tokens(batch: Batch, share: float) -> Tensor:
    """[B, T] bool: trained tokens with H_{i,t} >= the (1 - share)-quantile of the batch."""
    entropies, mask = batch.require("entropies").double(), batch.completion_mask
    return mask & (entropies >= masked.quantile(entropies, mask, 1 - share))


def advantages(batch: Batch, params: Params) -> Tensor:
    """[B, T] the standardised reward at the tokens kept, 0 elsewhere."""
    return grpo.advantages(batch, params) * kept_tokens(batch, params.share)


def working(batch: Batch, params: Params) -> dict[str, Tensor]:
    """Which tokens are kept."""
    return {"kept": kept_tokens(batch, params.share)}


METHOD = Method(
    name="high_entropy_tokens",
    params=Params,
    required_columns=frozenset({"entropies"}),
    advantages=advantages,
    policy_loss=grpo.policy_loss,
    aggregate=aggregate.token_mean,
    loss_needs=optional_columns,
    working=working,
    paper="arXiv 2506.01939",
    equation="A_i [H_{i,t} >= (1 - share)-quantile]; DAPO's loss over all tokens",
)
