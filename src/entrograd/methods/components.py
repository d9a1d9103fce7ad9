"""The four components of a method: reward composer, advantage estimator, prompt weighting, policy
loss. Each is independent of the others.

A component is a frozen dataclass. Its fields are its parameters, with the paper's defaults and each
with its equation beside it; `presets.py` names every component there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from torch import Tensor

from entrograd.methods.batch import Batch, Denominators
from entrograd.methods.parameters import AboveZero, NonNegative, Tokens
from entrograd.numerics import kl, masked
from entrograd.numerics.overlong import overlong_penalty
from entrograd.numerics.surrogate import importance_weight


@dataclass(frozen=True)
class Component:
    """What every component tells of itself."""

    choice: ClassVar[str]  # the key of section `method` that names it
    name: ClassVar[str]
    paper: ClassVar[str]
    equation: ClassVar[str]

    @property
    def required_columns(self) -> frozenset[str]:
        """The annotated columns that it reads with these parameters."""
        return frozenset()

    def working(self, batch: Batch) -> Mapping[str, Tensor]:  # noqa: ARG002 - no steps to show
        """What it computes on the way, [B] or [B, T] by name, for `entrograd explain`."""
        return {}


@dataclass(frozen=True)
class RewardComposer(Component):
    """How ratings become the one reward of a completion.

    An option of every composer, off by default: DAPO's penalty for long completions
    (arXiv 2503.14476, Eq. 13).
    """

    choice = "reward"
    label_free: ClassVar[bool] = False  # it takes no notice of correctness

    # Lmax, the length in tokens from which the penalty is -1 (DAPO: 20480); null: no penalty
    overlong_length: Tokens | None = None
    # Lc, the length in tokens over which it rises (DAPO: 4096)
    overlong_buffer: Tokens = 4096

    def __post_init__(self) -> None:
        if self.overlong_length is not None and self.overlong_buffer > self.overlong_length:
            raise ValueError(
                f"overlong_buffer ({self.overlong_buffer}) must not exceed overlong_length "
                f"({self.overlong_length})"
            )

    def composed(self, batch: Batch) -> Tensor:
        """[B] the reward without the penalty."""
        raise NotImplementedError

    def rewards(self, batch: Batch) -> Tensor:
        """[B] the composed reward plus the penalty, of the type of the graded rewards."""
        rewards = self.composed(batch)
        if self.overlong_length is not None:
            penalty = overlong_penalty(batch.lengths, self.overlong_length, self.overlong_buffer)
            rewards = rewards.double() + penalty
        return rewards.to(batch.rewards.dtype)

    def fitted(self, entropies: Mapping[str, float]) -> Self:  # noqa: ARG002 - nothing to fit
        """This composer with what it takes from the rating entropy (nats) of each reward head over
        the annotated data set."""
        return self

    def head_weights(self, names: tuple[str, ...]) -> Mapping[str, float]:  # noqa: ARG002
        """What each rating weighs in the reward, by name; {} if none is weighed."""
        return {}


class AdvantageEstimator(Component):
    """How (composed) rewards become an advantage per token."""

    choice = "advantage"
    by_correctness: ClassVar[bool] = False  # it tells correct from incorrect completions

    def advantages(self, batch: Batch) -> Tensor:
        """[B, T] of a whole optimiser batch."""
        raise NotImplementedError

    def loss_mask(self, batch: Batch) -> Tensor:
        """[B, T] bool, the trained tokens that enter the loss and what it divides by."""
        return batch.completion_mask


class PromptWeighting(Component):
    """How much a prompt counts: a factor on the advantages of its completions."""

    choice = "weighting"

    def weights(self, batch: Batch) -> Tensor:
        """[B] the factor of each completion, equal within a group."""
        raise NotImplementedError


@dataclass(frozen=True)
class PolicyLoss(Component):
    """The loss of each token and how the tokens' losses are added up.

    Two options belong to every policy loss and are off by default: a penalty towards a reference
    policy, and importance weights for completions that another engine sampled.
    """

    choice = "loss"

    # loss + kl_coefficient * KL_t(pi || pi_ref); reads ref_logprobs if above 0
    kl_coefficient: NonNegative = 0.0
    # k1: -d; k2: d^2/2; k3: exp(d) - d - 1, with d = log pi_ref - log pi
    kl_estimator: kl.Estimator = "k3"
    # weight w = exp(old_logprobs - sampling_logprobs): truncated min(w, cap), masked w*[w <= cap]
    importance_sampling: Literal["none", "truncated", "masked"] = "none"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    importance_sampling_cap: AboveZero = 2.0

    @property
    def required_columns(self) -> frozenset[str]:
        """What the options read."""
        columns = {
            "ref_logprobs": self.kl_coefficient > 0,
            "sampling_logprobs": self.importance_sampling != "none",
        }
        return frozenset(name for name, read in columns.items() if read)

    def surrogate(self, logprobs: Tensor, advantages: Tensor, batch: Batch) -> Tensor:
        """[B, T] the loss without its options."""
        raise NotImplementedError

    def losses(self, logprobs: Tensor, advantages: Tensor, batch: Batch) -> Tensor:
        """[B, T] w_t * surrogate_t + kl_coefficient * KL_t."""
        loss = self.surrogate(logprobs, advantages, batch)
        if self.importance_sampling != "none":
            loss = loss * importance_weight(
                batch.old_logprobs,
                batch.require("sampling_logprobs"),
                batch.completion_mask,
                kind=self.importance_sampling,
                level=self.importance_sampling_level,
                cap=self.importance_sampling_cap,
            )
        if self.kl_coefficient > 0:
            mask = batch.completion_mask
            current = masked.fill(logprobs, mask)
            reference = masked.fill(batch.require("ref_logprobs"), mask)
            loss = loss + self.kl_coefficient * kl.estimate(self.kl_estimator, current, reference)
        return loss

    def aggregate(self, loss: Tensor, mask: Tensor, counts: Denominators) -> Tensor:
        """The scalar of losses [B, T] at `mask`: summed over micro-batches it is the loss of the
        whole batch."""
        raise NotImplementedError

    def clipped(self, logprobs: Tensor, advantages: Tensor, batch: Batch) -> Mapping[str, Tensor]:
        """[B, T] bool by the name of a diagnostic: the tokens that the clip binds."""
        raise NotImplementedError


KINDS = (RewardComposer, AdvantageEstimator, PromptWeighting, PolicyLoss)
