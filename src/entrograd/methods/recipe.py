"""What a run uses: four components, composed. Training knows a method by this alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from entrograd.errors import NonFiniteError
from entrograd.methods.batch import Batch, Denominators, check_finite
from entrograd.methods.components import (
    AdvantageEstimator,
    Component,
    PolicyLoss,
    PromptWeighting,
    RewardComposer,
)
from entrograd.numerics import masked
from entrograd.numerics.semantic_entropy import Estimator


@dataclass(frozen=True)
class Recipe:
    """The four components of a run, each with its parameters."""

    name: str  # of the preset
    title: str  # the preset and the components that replace its own
    reward: RewardComposer
    advantage: AdvantageEstimator
    weighting: PromptWeighting
    loss: PolicyLoss
    estimator: Estimator = "rao"  # of the semantic entropy among the diagnostics

    @property
    def components(self) -> tuple[Component, ...]:
        """The four, in the order in which they are applied."""
        return (self.reward, self.advantage, self.weighting, self.loss)

    @property
    def required_columns(self) -> frozenset[str]:
        """The annotated columns that the four components read."""
        return frozenset().union(*(part.required_columns for part in self.components))

    @property
    def penalised(self) -> bool:
        """Whether the loss pulls on tokens without an advantage too: towards a reference policy."""
        return self.loss.kl_coefficient > 0

    @property
    def importance_sampling(self) -> bool:
        """Whether the policy loss weighs completions by importance."""
        return self.loss.importance_sampling != "none"

    def with_importance_sampling(
        self,
        kind: Literal["truncated", "masked"],
        level: Literal["token", "sequence"],
        cap: float,
    ) -> Recipe:
        """This recipe with importance weights in its policy loss."""
        loss = replace(
            self.loss,
            importance_sampling=kind,
            importance_sampling_level=level,
            importance_sampling_cap=cap,
        )
        return replace(self, loss=loss)

    def fitted(self, entropies: Mapping[str, float]) -> Recipe:
        """This recipe with what its reward takes from the heads' rating entropies (nats)."""
        return replace(self, reward=self.reward.fitted(entropies))

    def check_heads(self, head_names: Sequence[str]) -> None:
        """InputError if rewards cannot be composed of heads of these names."""
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
        self.reward.rewards(trial)

    def rewarded(self, batch: Batch) -> Batch:
        """`batch` with the composed rewards, and the graded ones beside them; NonFiniteError if
        one is no finite float32, which training holds it in."""
        rewards = self.reward.rewards(batch)
        if (bad := ~torch.isfinite(rewards.float())).any():
            place = int(bad.nonzero()[0])
            who = batch.names[place] if batch.names else f"group {int(batch.groups[place])}"
            raise NonFiniteError(
                f"{who}: the reward that {self.reward.name} composes of completion "
                f"{place} is {float(rewards[place])}; give smaller rewards or weights"
            )
        return replace(batch, rewards=rewards, graded_rewards=batch.rewards)

    def advantages(self, batch: Batch) -> Tensor:
        """[B, T] per-token advantages, detached, zero at padding; `batch` is a whole step's.

        Raises InputError if a value at a trained position is not finite.
        """
        check_finite(batch)
        with torch.no_grad():
            batch = self.rewarded(batch)
            advantages = self.advantage.advantages(batch)
            weights = self.weighting.weights(batch)
            return masked.fill(advantages * weights[:, None], batch.completion_mask)

    def loss_mask(self, batch: Batch) -> Tensor:
        """[B, T] bool, the tokens that `aggregate` and `denominators` count: the trained ones but
        for what the advantage estimator leaves out of the loss; `batch` is a whole step's."""
        with torch.no_grad():
            return self.advantage.loss_mask(self.rewarded(batch))

    def policy_loss(self, logprobs: Tensor, advantages: Tensor, batch: Batch) -> Tensor:
        """[B, T] loss of each token; `batch` may be a micro-batch.

        Raises InputError if a value at a trained position is not finite.
        """
        check_finite(batch, logprobs)
        return self.loss.losses(logprobs, advantages, batch)

    def aggregate(self, loss: Tensor, mask: Tensor, counts: Denominators) -> Tensor:
        """The scalar to differentiate; `mask` holds the micro-batch's rows of `loss_mask`."""
        return self.loss.aggregate(loss, mask, counts)
