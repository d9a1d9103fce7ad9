"""From a loss a token to the scalar to differentiate.

Each divides by counts of the whole optimiser batch, so the values of any split into micro-batches
(of whole completions) add up to the value of the batch, and so do their gradients.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from entrograd.numerics import masked


class Counts(Protocol):
    """What an aggregation divides by: counts over the whole optimiser batch."""

    @property
    def tokens(self) -> float: ...
    @property
    def completions(self) -> float: ...
    @property
    def max_length(self) -> float: ...


def token_mean(loss: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """sum_{i,t} loss_{i,t} / sum_i |o_i|  (DAPO, arXiv 2503.14476, Eq. 8)."""
    return masked.sums(loss, mask).sum() / max(counts.tokens, 1.0)


def sequence_mean(loss: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """(1/B) sum_i (1/|o_i|) sum_t loss_{i,t}  (GRPO, arXiv 2402.03300, Eq. 3)."""
    return masked.means(loss, mask).sum() / counts.completions


def constant_length(loss: Tensor, mask: Tensor, counts: Counts) -> Tensor:
    """sum_{i,t} loss_{i,t} / (B L), L the longest completion allowed (Dr.GRPO, 2503.20783)."""
    return masked.sums(loss, mask).sum() / (counts.completions * counts.max_length)
