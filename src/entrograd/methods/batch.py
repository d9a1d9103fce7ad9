"""The completions of one optimiser step as tensors, and the counts a loss divides by."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from entrograd.errors import InputError, NonFiniteError
from entrograd.storage.columns import BATCH_COLUMNS


@dataclass(frozen=True)
class Batch:
    """The completions of one optimiser step, padded on the right.

    B completions, T completion positions, R reward heads. Padding is where `completion_mask` is
    False; what stands there never matters. Whole groups only: `groups` numbers each completion's
    group from 0, in any order.
    """

    completion_mask: Tensor  # [B, T] bool, True = trained on
    groups: Tensor  # [B] long
    rewards: Tensor  # [B] float
    old_logprobs: Tensor  # [B, T] nats, the sampling policy by the trainer's own forward
    entropies: Tensor | None = None  # [B, T] nats, of the sampling policy
    cluster_ids: Tensor | None = None  # [B] long, equal within a group = same answer
    sampling_logprobs: Tensor | None = None  # [B, T] nats, as the engine reported them
    ref_logprobs: Tensor | None = None  # [B, T] nats, of a reference policy
    reward_heads: Tensor | None = None  # [B, R] each in [0, 1]
    segment_ids: Tensor | None = None  # [B, T] long
    head_names: tuple[str, ...] = ()  # names of the R heads
    names: tuple[str, ...] = ()  # [B] prompt ids, for messages
    token_scores: Tensor | None = None  # [B, T] of a token-level reward model
    answered: Tensor | None = None  # [B] bool, False = the completion holds no answer
    graded_rewards: Tensor | None = None  # [B] as graded, where `rewards` are composed ones

    @property
    def lengths(self) -> Tensor:
        """[B] number of trained tokens of each completion."""
        return self.completion_mask.sum(-1)

    @property
    def correct(self) -> Tensor:
        """[B] bool: the graded reward is above 0."""
        return (self.rewards if self.graded_rewards is None else self.graded_rewards) > 0

    def require(self, column: str) -> Tensor:
        """The optional column; InputError if this batch does not carry it."""
        value = getattr(self, column)
        if not isinstance(value, Tensor):
            raise InputError(f"the method reads {column}, which these completions do not have")
        return value

    def to_tokens(self, scores: Tensor) -> Tensor:
        """[B, T] a completion's score [B] at each of its tokens, 0 at padding."""
        return scores.to(self.rewards.dtype)[:, None] * self.completion_mask

    def select(self, rows: Tensor) -> Batch:
        """The completions at `rows` (long indexes), in that order."""
        part: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                part[item.name] = value[rows]
        if self.names:
            part["names"] = tuple(self.names[int(row)] for row in rows)
        return replace(self, **part)


@dataclass(frozen=True)
class Denominators:
    """Counts over the *whole* optimiser batch, whatever the micro-batch: what a loss divides by."""

    tokens: float  # tokens that enter the loss
    completions: float  # completions
    max_length: float  # the constant L of Dr.GRPO: the longest completion sampling allows


def denominators(batch: Batch, max_length: int, loss_mask: Tensor | None = None) -> Denominators:
    """Count a whole optimiser batch; its tokens are those of `loss_mask` [B, T] if given."""
    return Denominators(
        tokens=float((batch.completion_mask if loss_mask is None else loss_mask).sum()),
        completions=float(batch.completion_mask.shape[0]),
        max_length=float(max_length),
    )


def check_finite(batch: Batch, logprobs: Tensor | None = None) -> None:
    """Every value at a trained position is a finite number.

    Args:
        batch: any columns; those it does not carry are skipped.
        logprobs: [B, T] nats, of the current policy.

    Raises:
        NonFiniteError: names the prompt, the row, the column and the token of the first bad value.
    """
    columns = {name: getattr(batch, name) for name in BATCH_COLUMNS}
    for name, values in {**columns, "logprobs": logprobs}.items():
        if values is None:
            continue
        bad = ~torch.isfinite(values)
        if name == "logprobs" or BATCH_COLUMNS[name].per == "token":
            bad = bad & batch.completion_mask
        if bad.any():
            row, *place = (int(index) for index in bad.nonzero()[0])
            where = f" {'head' if name == 'reward_heads' else 'token'} {place[0]}" if place else ""
            prompt = batch.names[row] if batch.names else f"of group {int(batch.groups[row])}"
            value = float(values[row, *place].detach())
            raise NonFiniteError(
                f"prompt {prompt}: row {row}:{where} {name} is {value}; "
                "a step takes finite numbers only: drop the completion or annotate it again"
            )
