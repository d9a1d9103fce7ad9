"""The contract of a method: a batch of completions in, per-token advantages and a loss out.

Four choices are independent of each other and compose: how reward heads become one reward, how
credit is given to tokens, how a prompt's update is modulated, and the policy loss with its
aggregation. A `Method` is a preset of the four; a `Recipe` is what a run really uses, each choice
taken from the preset or from another method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from entrograd.errors import InputError, NonFiniteError
from entrograd.numerics import masked


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
        """The optional column; InputError where this batch does not carry it."""
        value = getattr(self, column)
        if not isinstance(value, Tensor):
            raise InputError(f"the method reads {column}, which these completions do not have")
        return value

    def select(self, rows: Tensor) -> Batch:
        """The completions at `rows` (long indexes), in that order."""
        chosen: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                chosen[item.name] = value[rows]
        if self.names:
            chosen["names"] = tuple(self.names[int(row)] for row in rows)
        return replace(self, **chosen)


@dataclass(frozen=True)
class Denominators:
    """Counts over the *whole* optimiser batch, whatever the micro-batch: what a loss divides by."""

    tokens: float  # trained tokens
    completions: float  # completions
    max_length: float  # the constant L of Dr.GRPO: the longest completion sampling allows


def denominators(batch: Batch, max_length: int) -> Denominators:
    """Count a whole optimiser batch."""
    return Denominators(
        tokens=float(batch.completion_mask.sum()),
        completions=float(batch.completion_mask.shape[0]),
        max_length=float(max_length),
    )


TOKEN_COLUMNS = ("old_logprobs", "entropies", "sampling_logprobs", "ref_logprobs", "token_scores")
COMPLETION_COLUMNS = ("rewards", "reward_heads")


def check_finite(batch: Batch, logprobs: Tensor | None = None) -> None:
    """Every value at a trained position is a finite number.

    Args:
        batch: any columns; those it does not carry are skipped.
        logprobs: [B, T] nats, of the current policy.

    Raises:
        NonFiniteError: names the prompt, the row, the column and the token of the first bad value.
    """
    columns = {name: getattr(batch, name) for name in TOKEN_COLUMNS + COMPLETION_COLUMNS}
    for name, values in {**columns, "logprobs": logprobs}.items():
        if values is None:
            continue
        bad = ~torch.isfinite(values)
        if name not in COMPLETION_COLUMNS:
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


Rewards = Callable[[Batch, Any], Tensor]
Advantages = Callable[[Batch, Any], Tensor]
Modulation = Callable[[Batch, Any], Tensor]
PolicyLoss = Callable[[Tensor, Tensor, Batch, Any], Tensor]
Aggregate = Callable[[Tensor, Tensor, Denominators], Tensor]


def single_reward(batch: Batch, params: Any) -> Tensor:  # noqa: ARG001 - the contract's shape
    """[B] the reward as it was graded."""
    return batch.rewards


def no_modulation(batch: Batch, params: Any) -> Tensor:  # noqa: ARG001 - the contract's shape
    """[B] multiplier 1."""
    return torch.ones_like(batch.rewards)


@dataclass(frozen=True)
class Method:
    """A preset of the four choices.

    params: a frozen dataclass, the paper's defaults, each field documented with its equation.
    needs: annotated columns it reads, checked before anything runs.
    advantages: (Batch, params) -> [B, T], detached; credit alone, before modulation.
    policy_loss: (logprobs [B, T], advantages [B, T], Batch, params) -> [B, T].
    aggregate: (loss [B, T], mask [B, T], Denominators) -> scalar; a sum over micro-batches of
        what it returns is the loss of the whole batch.
    compose_rewards: (Batch, params) -> [B].
    modulate: (Batch, params) -> [B], the factor of each completion's advantages.
    fit: (reward_heads [N, R] of the whole annotated data set, head names, params) -> params, where
        the method measures something there once before training.
    needs_for: params -> columns, where they depend on parameters; instead of `needs`.
    loss_needs: params -> further optional columns its policy loss reads.
    paper, equation: what `entrograd methods` shows.
    """

    name: str
    params: type
    needs: frozenset[str]
    advantages: Advantages
    policy_loss: PolicyLoss
    aggregate: Aggregate
    compose_rewards: Rewards = single_reward
    modulate: Modulation = no_modulation
    fit: Callable[[Tensor, tuple[str, ...], Any], Any] | None = None
    needs_for: Callable[[Any], frozenset[str]] | None = None
    loss_needs: Callable[[Any], frozenset[str]] | None = None
    paper: str = ""
    equation: str = ""


@dataclass(frozen=True)
class Recipe:
    """What a run uses: for each choice the method it is taken from, and every method's params."""

    name: str
    reward: Method
    credit: Method
    modulation: Method
    loss: Method
    params: Mapping[str, Any] = field(default_factory=dict)  # method name -> its dataclass

    @property
    def needs(self) -> frozenset[str]:
        """The annotated columns the four choices read."""
        found: frozenset[str] = frozenset()
        for method in (self.reward, self.credit, self.modulation, self.loss):
            params = self.params[method.name]
            found |= method.needs_for(params) if method.needs_for else method.needs
        if self.loss.loss_needs:
            found |= self.loss.loss_needs(self.params[self.loss.name])
        return found

    def fitted(self, reward_heads: Tensor, head_names: tuple[str, ...]) -> Recipe:
        """This recipe with what its reward composition measures on the whole data set [N, R]."""
        if self.reward.fit is None:
            return self
        params = self.reward.fit(reward_heads, head_names, self.params[self.reward.name])
        return replace(self, params={**self.params, self.reward.name: params})

    def advantages(self, batch: Batch) -> Tensor:
        """[B, T] per-token advantages, detached, zero at padding; `batch` is a whole step's.

        Raises InputError where a value at a trained position is not finite.
        """
        check_finite(batch)
        with torch.no_grad():
            rewards = self.reward.compose_rewards(batch, self.params[self.reward.name])
            batch = replace(batch, rewards=rewards, graded_rewards=batch.rewards)
            credit = self.credit.advantages(batch, self.params[self.credit.name])
            factor = self.modulation.modulate(batch, self.params[self.modulation.name])
            return masked.fill(credit * factor[:, None], batch.completion_mask)

    def policy_loss(self, logprobs: Tensor, advantages: Tensor, batch: Batch) -> Tensor:
        """[B, T] loss of each token; `batch` may be a micro-batch.

        Raises InputError where a value at a trained position is not finite.
        """
        check_finite(batch, logprobs)
        return self.loss.policy_loss(logprobs, advantages, batch, self.params[self.loss.name])

    def aggregate(self, loss: Tensor, mask: Tensor, counts: Denominators) -> Tensor:
        """The scalar to differentiate."""
        return self.loss.aggregate(loss, mask, counts)
