"""One forward pass for three uses: old_logprobs, entropies and a round's first update.

Before the first update of a round the current policy is the one that sampled. What scoring
computes for old_logprobs is then what that update differentiates: for the completions of one
micro-batch the graph is kept, and the update has no forward of its own for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entrograd.models.forward import (
    TokenValues,
    batches,
    completion_logprobs,
    per_completion,
    score,
)


@dataclass(frozen=True)
class CachedForward:
    """Logprobs of some rows of a round under the weights that sampled, with their graph."""

    rows: Tensor  # [n] long, indexes of the round's rows
    logprobs: Tensor  # [N] nats, differentiable, the rows' completion tokens one after another


class Scoring:
    """Scores the rows of a round and keeps the graph of one micro-batch of them.

    train_budget bounds the tokens of that micro-batch, score_budget those of a pass without graph.
    """

    def __init__(
        self,
        model: Any,
        temperature: float,
        train_budget: int,
        score_budget: int,
        share_prompts: bool | None = None,
    ) -> None:
        self.model, self.temperature = model, temperature
        self.train_budget, self.score_budget = train_budget, score_budget
        self.share_prompts = share_prompts
        self._kept: CachedForward | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[TokenValues]:
        """(logprobs, entropies) of each row's completion, in nats. Which rows keep their graph
        depends on `rows` alone, so scoring them again under the same weights gives the same."""
        prompts = [row["prompt_ids"] for row in rows]
        completions = [row["completion_ids"] for row in rows]
        chosen = _with_signal(rows)
        planned = batches(
            [prompts[i] for i in chosen], [completions[i] for i in chosen], self.train_budget
        )
        kept = [chosen[i] for i in next(planned, [])]
        rest = sorted(set(range(len(rows))) - set(kept))
        values: dict[int, TokenValues] = {}
        self._kept = None
        if kept:
            parts = [completions[i] for i in kept]
            flat, entropies = completion_logprobs(
                self.model,
                [prompts[i] for i in kept],
                parts,
                self.temperature,
                self.share_prompts,
            )
            self._kept = CachedForward(torch.tensor(kept), flat)
            values |= zip(kept, per_completion(flat.detach(), entropies, parts), strict=True)
        scored = score(
            self.model,
            [prompts[i] for i in rest],
            [completions[i] for i in rest],
            self.temperature,
            self.score_budget,
        )
        values |= zip(rest, scored, strict=True)
        return [values[i] for i in range(len(rows))]

    def take(self) -> CachedForward | None:
        """What the last call kept, once: after an update the weights are others."""
        kept, self._kept = self._kept, None
        return kept


def _with_signal(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Rows of groups whose rewards differ. A guess at who will have advantages, which only the
    method knows: a wrong one costs time, never a gradient."""
    rewards: dict[str, set[float]] = {}
    for row in rows:
        rewards.setdefault(row["prompt_id"], set()).add(row["reward"])
    return [i for i, row in enumerate(rows) if len(rewards[row["prompt_id"]]) > 1]
