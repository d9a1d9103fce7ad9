"""From groups of completions to the padded batch of one optimiser update, and its micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entrograd.data.groups import PromptGroup
from entrograd.errors import InputError
from entrograd.methods.batch import Batch
from entrograd.models.forward import batches
from entrograd.storage.columns import TOKEN_COLUMNS
from entrograd.train.processes import Processes, own_rows


@dataclass(frozen=True)
class Examples:
    """B completions of whole groups: their tokens, and the Batch the method sees."""

    prompt_ids: Sequence[np.ndarray]  # B arrays, of the prompt of each completion
    completion_ids: Sequence[np.ndarray]  # B arrays
    batch: Batch

    def __len__(self) -> int:
        return len(self.completion_ids)


def examples(groups: Sequence[PromptGroup], device: torch.device) -> Examples:
    """Annotated groups as Examples on `device`.

    Optional columns that any completion lacks are None in the Batch. InputError where one lacks
    `old_logprobs`, which every step divides by.
    """
    pairs = [(group, completion) for group in groups for completion in group.completions]
    completions = [completion for _, completion in pairs]
    lengths = np.array([len(completion) for completion in completions])
    mask = np.arange(lengths.max()) < lengths[:, None]

    def token_column(name: str) -> Tensor | None:
        arrays = [c.tokens[name] for c in completions if name in c.tokens]
        return padded(arrays, mask, device) if len(arrays) == len(completions) else None

    tokens = {c.batch: token_column(name) for name, c in TOKEN_COLUMNS.items() if c.batch}
    old_logprobs = tokens.pop("old_logprobs")
    if old_logprobs is None:
        raise InputError("column old_logprobs: a row has no values; annotate the rollouts first")
    heads = [completion.reward_heads or {} for completion in completions]
    clusters = [completion.cluster_id for completion in completions]
    batch = Batch(
        completion_mask=torch.from_numpy(mask).to(device),
        groups=torch.tensor([i for i, group in enumerate(groups) for _ in range(len(group))])
        .long()
        .to(device),
        rewards=torch.tensor([float(c.reward or 0.0) for c in completions], device=device),
        old_logprobs=old_logprobs,
        cluster_ids=None if None in clusters else torch.tensor(clusters, device=device),
        reward_heads=torch.tensor([list(row.values()) for row in heads], device=device)
        if all(heads)
        else None,
        head_names=tuple(heads[0]) if all(heads) else (),
        names=tuple(group.prompt_id for group, _ in pairs),
        answered=torch.tensor([bool(c.answer) for c in completions], device=device),
        **tokens,
    )
    return Examples(
        [g.prompt_ids for g, _ in pairs], [c.completion_ids for c in completions], batch
    )


def padded(arrays: Sequence[np.ndarray], mask: np.ndarray, device: torch.device) -> Tensor:
    """[B, T] the arrays one after another at the places of `mask`, 0 elsewhere; whole numbers as
    int64."""
    values = np.concatenate(arrays)
    dtype = np.dtype(np.int64) if np.issubdtype(values.dtype, np.integer) else values.dtype
    table = np.zeros(mask.shape, dtype)
    table[mask] = values
    return torch.from_numpy(table).to(device)


def micro_batches(
    examples: Examples,
    advantages: Tensor,
    token_budget: int,
    first: Tensor | None = None,
    processes: Processes | None = None,
    penalised: bool = False,
) -> list[Tensor]:
    """Row indexes of each micro-batch, at most `token_budget` tokens each; `first`, where given and
    not without gradient as a whole, is the first of them as it is. Of several `processes` each
    gets its own rows, whole groups; where they must make equally many passes, some have no rows.

    Rows whose advantages are all zero add nothing to the gradient and are left out, unless a
    penalty of the loss pulls on them (`penalised`); the denominators count them all the same.
    """
    active = (advantages != 0).any(-1) | penalised
    done = [] if first is None or not active[first].any() else [first]
    if done:
        active[first] = False
    rows = active.nonzero()[:, 0].tolist()
    if processes and processes.count > 1:
        own = own_rows(
            [examples.prompt_ids[i] for i in rows],
            [examples.completion_ids[i] for i in rows],
            examples.batch.groups[rows].tolist(),
            processes.rank,
            processes.count,
        )
        rows = [row for row, mine in zip(rows, own, strict=True) if mine]
    planned = batches(
        [examples.prompt_ids[i] for i in rows],
        [examples.completion_ids[i] for i in rows],
        token_budget,
    )
    parts = done + [torch.tensor([rows[i] for i in batch]) for batch in planned]
    return processes.even(parts, torch.tensor([], dtype=torch.long)) if processes else parts
