"""The contract of a method: a batch of completions in, per-token advantages and a loss out.

Four choices are independent of each other and compose: how reward heads become one reward, how
credit is given to tokens, how a prompt's update is modulated, and the policy loss with its
aggregation. A `Method` is a preset of the four; a `Recipe` is what a run really uses, each choice
taken from the preset or from another method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from entrograd.errors import InputError, NonFiniteError
from entrograd.methods.params import CHOICES
from entrograd.numerics import masked, surrogate


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

    tokens: float  # tokens that enter the loss
    completions: float  # completions
    max_length: float  # the constant L of Dr.GRPO: the longest completion sampling allows


def denominators(batch: Batch, max_length: int, loss_mask: Tensor | None = None) -> Denominators:
    """Count a whole optimiser batch; its tokens are those of `loss_mask` [B, T] where given."""
    return Denominators(
        tokens=float((batch.completion_mask if loss_mask is None else loss_mask).sum()),
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
    needs: annotated columns it reads, checked before anything runs, where it is taken for the
        choice it is about; of its defaults where `needs_for` tells them.
    advantages: (Batch, params) -> [B, T], detached; credit alone, before modulation.
    loss_mask: (Batch, params) -> [B, T] bool, the trained tokens that enter the loss and what it
        divides by, where its credit leaves others out.
    policy_loss: (logprobs [B, T], advantages [B, T], Batch, params) -> [B, T].
    aggregate: (loss [B, T], mask [B, T], Denominators) -> scalar; a sum over micro-batches of
        what it returns is the loss of the whole batch.
    about: the choice that sets it apart: `needs` and `working` belong to that one.
    compose_rewards: (Batch, params) -> [B].
    modulate: (Batch, params) -> [B], the factor of each completion's advantages.
    fit: (rating entropy of each reward head over the annotated data set, nats, params) -> params,
        where the composition of rewards depends on them.
    needs_for: params -> columns, where they depend on parameters; instead of `needs`.
    loss_needs: params -> further optional columns its policy loss reads.
    ratio: (logprobs, old_logprobs, mask) -> [B, T], the ratio its policy loss clips.
    clips_weight: it clips the ratio as a weight, so that tokens beyond keep their gradient.
    head_weights: (head names, params) -> the weight of each in the composed reward, by name.
    working: (Batch, params) -> what it computes on the way, [B] or [B, T] by name, for
        `entrograd explain`.
    label_free: its reward composition takes no notice of correctness.
    by_correctness: its credit tells correct from incorrect completions.
    paper, equation: what `entrograd methods` shows.
    """

    name: str
    params: type
    advantages: Advantages
    policy_loss: PolicyLoss
    aggregate: Aggregate
    required_columns: frozenset[str] = frozenset()
    about: Literal["reward", "credit", "modulation", "loss"] = "credit"
    compose_rewards: Rewards = single_reward
    modulate: Modulation = no_modulation
    fit: Callable[[Mapping[str, float], Any], Any] | None = None
    needs_for: Callable[[Any], frozenset[str]] | None = None
    loss_needs: Callable[[Any], frozenset[str]] | None = None
    loss_mask: Callable[[Batch, Any], Tensor] | None = None
    ratio: Callable[[Tensor, Tensor, Tensor], Tensor] = surrogate.token_ratio
    clips_weight: bool = False
    head_weights: Callable[[tuple[str, ...], Any], Mapping[str, float]] | None = None
    working: Callable[[Batch, Any], Mapping[str, Tensor]] | None = None
    label_free: bool = False
    by_correctness: bool = False
    paper: str = ""
    equation: str = ""

    def __post_init__(self) -> None:
        if self.needs_for is not None:
            object.__setattr__(self, "required_columns", self.needs_for(self.params()))

    def reads(self, choice: str, params: Any) -> frozenset[str]:
        """The annotated columns it reads where it is taken for `choice`, with these parameters."""
        found: frozenset[str] = frozenset()
        if choice == self.about:
            found |= self.needs_for(params) if self.needs_for else self.required_columns
        if choice == "loss" and self.loss_needs:
            found |= self.loss_needs(params)
        return found


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
    def required_columns(self) -> frozenset[str]:
        """The annotated columns the four choices read."""
        taken = {choice: getattr(self, choice) for choice in CHOICES}
        return frozenset().union(
            *(method.reads(choice, self.params[method.name]) for choice, method in taken.items())
        )

    @property
    def penalised(self) -> bool:
        """Whether the loss pulls on tokens without an advantage too: towards a reference policy."""
        reads = self.loss.loss_needs
        return reads is not None and "ref_logprobs" in reads(self.params[self.loss.name])

    def fitted(self, entropies: Mapping[str, float]) -> Recipe:
        """This recipe with what its reward composition takes from the heads' rating entropies."""
        if self.reward.fit is None:
            return self
        params = self.reward.fit(entropies, self.params[self.reward.name])
        return replace(self, params={**self.params, self.reward.name: params})

    def check_heads(self, head_names: Sequence[str]) -> None:
        """InputError where rewards cannot be composed of heads of these names."""
        trial = Batch(
            completion_mask=torch.ones(1, 1, dtype=torch.bool),
            groups=torch.zeros(1, dtype=torch.long),
            rewards=torch.zeros(1),
            old_logprobs=torch.zeros(1, 1),
            cluster_ids=torch.zeros(1, dtype=torch.long),
            answered=torch.ones(1, dtype=torch.bool),
            reward_heads=torch.zeros(1, len(head_names)),
            head_names=tuple(head_names),
        )
        self.reward.compose_rewards(trial, self.params[self.reward.name])

    def advantages(self, batch: Batch) -> Tensor:
        """[B, T] per-token advantages, detached, zero at padding; `batch` is a whole step's.

        Raises InputError where a value at a trained position is not finite.
        """
        check_finite(batch)
        with torch.no_grad():
            batch = self.rewarded(batch)
            credit = self.credit.advantages(batch, self.params[self.credit.name])
            factor = self.modulation.modulate(batch, self.params[self.modulation.name])
            return masked.fill(credit * factor[:, None], batch.completion_mask)

    def rewarded(self, batch: Batch) -> Batch:
        """`batch` with the composed rewards, and the graded ones beside them; NonFiniteError where
        one is no finite float32, which training holds it in."""
        rewards = self.reward.compose_rewards(batch, self.params[self.reward.name])
        if (bad := ~torch.isfinite(rewards.float())).any():
            place = int(bad.nonzero()[0])
            who = batch.names[place] if batch.names else f"group {int(batch.groups[place])}"
            raise NonFiniteError(
                f"{who}: the reward that {self.reward.name} composes of completion "
                f"{place} is {float(rewards[place])}; give smaller rewards or weights"
            )
        return replace(batch, rewards=rewards, graded_rewards=batch.rewards)

    def loss_mask(self, batch: Batch) -> Tensor:
        """[B, T] bool, the tokens that `aggregate` and `denominators` count: the trained ones but
        for what the credit leaves out of the loss; `batch` is a whole step's."""
        if self.credit.loss_mask is None:
            return batch.completion_mask
        with torch.no_grad():
            return self.credit.loss_mask(self.rewarded(batch), self.params[self.credit.name])

    def policy_loss(self, logprobs: Tensor, advantages: Tensor, batch: Batch) -> Tensor:
        """[B, T] loss of each token; `batch` may be a micro-batch.

        Raises InputError where a value at a trained position is not finite.
        """
        check_finite(batch, logprobs)
        return self.loss.policy_loss(logprobs, advantages, batch, self.params[self.loss.name])

    def aggregate(self, loss: Tensor, mask: Tensor, counts: Denominators) -> Tensor:
        """The scalar to differentiate; `mask` holds the micro-batch's rows of `loss_mask`."""
        return self.loss.aggregate(loss, mask, counts)
