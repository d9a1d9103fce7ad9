"""One forward pass for three uses: old_logprobs, entropies and a round's first update.

Before the first update of a round the current policy is the one that sampled. What scoring
computes for old_logprobs is then what that update differentiates: for the completions of one
micro-batch the graph is kept, and the update has no forward of its own for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entrograd.data.groups import PromptGroup
from entrograd.models.forward import (
    TokenValues,
    batches,
    completion_logprobs,
    per_completion,
    score,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from entrograd.train.forward_backward import StepSettings


@dataclass(frozen=True)
class CachedForward:
    """Logprobs of some rows of a round under the weights that sampled, with their graph."""

    rows: Tensor  # [n] long, indexes of the round's rows
    logprobs: Tensor  # [N] nats, differentiable, the rows' completion tokens one after another


class Scoring:
    """Scores the completions of a round and keeps the graph of one micro-batch of them.

    settings: of the update; its token_budget bounds that micro-batch.
    score_budget: bounds the tokens of a pass without graph.
    first: the round's first update is made on so many of its groups, the first; None: on all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: StepSettings,
        score_budget: int,
        first: int | None = None,
    ) -> None:
        self.model, self.settings = model, settings
        self.score_budget, self.first = score_budget, first
        self._cached: CachedForward | None = None

    def __call__(self, groups: Sequence[PromptGroup]) -> list[TokenValues]:
        """(logprobs, entropies) of each completion, [T] in nats, group after group. Which
        keep their graph depends on `groups` alone, so scoring them again under the same weights
        gives the same."""
        prompts = [group.prompt_ids for group in groups for _ in group.completions]
        completions = [c.completion_ids for group in groups for c in group.completions]
        signal = _with_signal(groups[: self.first])
        budget, temperature = self.settings.token_budget, self.settings.temperature
        planned = batches([prompts[i] for i in signal], [completions[i] for i in signal], budget)
        kept = [signal[i] for i in next(planned, [])]
        rest = sorted(set(range(len(completions))) - set(kept))
        values: dict[int, TokenValues] = {}
        self._cached = None
        if kept:
            parts = [completions[i] for i in kept]
            flat, entropies = completion_logprobs(
                self.model,
                [prompts[i] for i in kept],
                parts,
                temperature,
                self.settings.share_prompts,
            )
            self._cached = CachedForward(torch.tensor(kept), flat)
            values |= zip(kept, per_completion(flat.detach(), entropies, parts), strict=True)
        scored = score(
            self.model,
            [prompts[i] for i in rest],
            [completions[i] for i in rest],
            temperature,
            self.score_budget,
        )
        values |= zip(rest, scored, strict=True)
        return [values[i] for i in range(len(completions))]

    def take(self) -> CachedForward | None:
        """What the last call kept, once: after an update the weights are others."""
        cached, self._cached = self._cached, None
        return cached


def _with_signal(groups: Sequence[PromptGroup]) -> list[int]:
    """Completions of groups whose rewards differ. A guess at who will have advantages, which only
    the method knows: a wrong one costs time, never a gradient."""
    differs = [
        len({completion.reward for completion in group.completions}) > 1
        for group in groups
        for _ in group.completions
    ]
    return [i for i, signal in enumerate(differs) if signal]
