"""From annotated rows to the padded batch of one optimiser step, and its micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entrograd.errors import InputError
from entrograd.methods.batch import Batch
from entrograd.models.forward import batches
from entrograd.train.processes import Processes, own_rows


@dataclass(frozen=True)
class Examples:
    """B completions of whole groups: their tokens, and the Batch the method sees."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    batch: Batch

    def __len__(self) -> int:
        return len(self.completion_ids)


def examples(rows: Sequence[Mapping[str, Any]], device: torch.device) -> Examples:
    """Annotated rows (schema `annotated`) as Examples on `device`; rows of one prompt are a group.

    Optional columns that any row lacks are None in the Batch.
    """
    numbers = {name: i for i, name in enumerate(dict.fromkeys(row["prompt_id"] for row in rows))}
    lengths = [len(row["completion_ids"]) for row in rows]
    width = max(lengths)

    def column(name: str) -> Tensor | None:
        if any(row.get(name) is None for row in rows):
            return None
        for row, length in zip(rows, lengths, strict=True):
            if len(row[name]) != length:
                raise InputError(
                    f"prompt {row['prompt_id']} sample {row['sample_index']}: {name} has "
                    f"{len(row[name])} values for {length} completion tokens; annotate it again"
                )
        padded = [[*row[name], *[0] * (width - len(row[name]))] for row in rows]
        return torch.tensor(padded, device=device)

    def required(name: str) -> Tensor:
        value = column(name)
        if value is None:
            raise InputError(f"column {name}: a row has no values; annotate the rollouts first")
        return value

    heads = [row.get("reward_heads") for row in rows]
    named = all(heads)
    batch = Batch(
        completion_mask=torch.arange(width, device=device)
        < torch.tensor(lengths, device=device)[:, None],
        groups=torch.tensor([numbers[row["prompt_id"]] for row in rows], device=device),
        rewards=torch.tensor([float(row["reward"]) for row in rows], device=device),
        old_logprobs=required("old_logprobs"),
        entropies=column("entropies"),
        cluster_ids=torch.tensor([row["cluster_id"] for row in rows], device=device),
        sampling_logprobs=column("sampling_logprobs"),
        segment_ids=column("segment_ids"),
        ref_logprobs=column("ref_logprobs"),
        token_scores=column("token_scores"),
        reward_heads=torch.tensor([[h["value"] for h in row or ()] for row in heads], device=device)
        if named
        else None,
        head_names=tuple(h["name"] for h in heads[0]) if named and heads[0] else (),
        names=tuple(row["prompt_id"] for row in rows),
        answered=torch.tensor([bool(row.get("answer")) for row in rows], device=device),
    )
    return Examples(
        [list(row["prompt_ids"]) for row in rows],
        [list(row["completion_ids"]) for row in rows],
        batch,
    )


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
    kept = active.nonzero()[:, 0].tolist()
    if processes and processes.count > 1:
        own = own_rows(
            [examples.prompt_ids[i] for i in kept],
            [examples.completion_ids[i] for i in kept],
            examples.batch.groups[kept].tolist(),
            processes.rank,
            processes.count,
        )
        kept = [row for row, mine in zip(kept, own, strict=True) if mine]
    planned = batches(
        [examples.prompt_ids[i] for i in kept],
        [examples.completion_ids[i] for i in kept],
        token_budget,
    )
    parts = done + [torch.tensor([kept[i] for i in rows]) for rows in planned]
    return processes.even(parts, torch.tensor([], dtype=torch.long)) if processes else parts
