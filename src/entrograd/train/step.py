"""One optimiser step, whatever the method: advantages, loss by micro-batches, update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from entrograd.errors import NonFiniteError
from entrograd.methods.batch import Batch, denominators
from entrograd.methods.diagnostics import diagnostics
from entrograd.methods.recipe import Recipe
from entrograd.models.forward import completion_logprobs
from entrograd.train.batch import Examples, micro_batches
from entrograd.train.optimizer import Optimizer
from entrograd.train.processes import ALONE, Processes
from entrograd.train.scoring import CachedForward


@dataclass(frozen=True)
class StepSettings:
    """What a step needs beside model, method and data."""

    temperature: float  # of the policy that is trained, as it sampled
    max_length: int  # the longest completion sampling allows
    token_budget: int  # tokens of one micro-batch
    share_prompts: bool | None = None  # compute each prompt once; None: where that saves tokens


def train_step(
    model: Any,
    optimizer: Optimizer,
    recipe: Recipe,
    examples: Examples,
    settings: StepSettings,
    kept: CachedForward | None = None,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Update `model` once on whole groups; returns the step's diagnostics.

    The advantages and the loss's denominators are those of the whole batch, so any split into
    micro-batches and processes gives the same gradient. Rows of `kept` are differentiated as they
    were scored. Every one of `processes` calls this with the same batch and makes the same update.
    NonFiniteError, before the update, names the prompts.
    """
    batch = examples.batch
    advantages = recipe.advantages(batch)
    counted = recipe.loss_mask(batch)
    counts = denominators(batch, settings.max_length, counted)
    logprobs = batch.old_logprobs.clone()
    loss_sum = 0.0
    computed: list[int] = []
    first = kept.rows if kept else None
    for rows in micro_batches(
        examples, advantages, settings.token_budget, first, processes, recipe.penalised
    ):
        if not len(rows):  # a pass of other processes, whose weights this one holds in part
            completion_logprobs(model, [[0]], [[0]], settings.temperature)[0].mul(0).backward()
            continue
        part, mask = batch.select(rows), batch.completion_mask[rows]
        if kept and rows is first:
            flat = kept.logprobs
        else:
            flat, _ = completion_logprobs(
                model,
                [examples.prompt_ids[i] for i in rows],
                [examples.completion_ids[i] for i in rows],
                settings.temperature,
                settings.share_prompts,
            )
        current = part.old_logprobs.to(flat.dtype).masked_scatter(mask, flat)
        if not torch.isfinite(flat).all():
            bad = (~torch.isfinite(current)).any(-1).nonzero()[:, 0]
            raise NonFiniteError(f"logprobs that are no numbers on {_prompts(part.select(bad))}")
        token_loss = recipe.policy_loss(current, advantages[rows], part)
        loss = recipe.aggregate(token_loss, counted[rows], counts)
        if not torch.isfinite(loss):
            raise NonFiniteError(f"loss {float(loss.detach())} on {_prompts(part)}")
        loss.backward()
        optimizer.collect()
        loss_sum += float(loss.detach())
        logprobs[rows] = current.detach().to(logprobs.dtype)
        computed += rows.tolist()
    processes.add_gradients(list(optimizer.masters.values()))
    processes.fill(logprobs, computed)
    loss_sum = processes.total(loss_sum, logprobs.device)
    norm = optimizer.gradient_norm()
    if not norm < float("inf"):
        raise NonFiniteError(f"gradient norm {norm} on {_prompts(batch)}")
    rate = optimizer.learning_rate()
    optimizer.step(norm)
    measured = diagnostics(recipe, batch, logprobs, advantages)
    return {"loss": loss_sum, "grad_norm": norm, "lr": rate, **measured}


def _prompts(batch: Batch) -> str:
    return f"prompts {', '.join(dict.fromkeys(batch.names))}"
