"""Stage train_offline: epochs over stored, annotated rollouts, with clipped importance ratios."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from entrograd.annotate.reward_weights import head_entropies, head_values
from entrograd.errors import InputError
from entrograd.methods.params import MethodParams
from entrograd.methods.recipe import Recipe
from entrograd.methods.registry import recipe as choose
from entrograd.models.load import load_tokenizer
from entrograd.pipeline.progress import progress
from entrograd.rollout.params import Sampling
from entrograd.storage.tables import provenance, read_table
from entrograd.train.batch import examples
from entrograd.train.checkpoint import Checkpoints
from entrograd.train.curve import Curve, Stopwatch
from entrograd.train.params import TrainOfflineParams
from entrograd.train.processes import connect
from entrograd.train.reference import load_reference
from entrograd.train.required_columns import check_columns, check_required_columns, with_heads
from entrograd.train.setup import Policy, bad_batch_kept
from entrograd.train.step import StepSettings, train_step

log = logging.getLogger("entrograd")

Group = list[dict[str, Any]]


def train_offline(
    params: TrainOfflineParams,
    method: MethodParams,
    model: Path,
    annotated: Path,
    out: Path,
    curve: Path,
    resume: Path,
    *,
    reward_heads: Path | None = None,
) -> str:
    """Train the model in `model` on the annotated table; write weights and learning curve.

    The ratio's denominator is the stored `old_logprobs`; temperature and length limit are those
    the table's provenance says it was sampled with. ENCORE's entropies are those in
    `reward_heads`, or without that file the table's own. Unfinished work in `resume` is continued.
    Returns the one-line result.
    """
    recipe = choose(method)
    check_required_columns(recipe, "train_offline", params, None)
    groups = read_groups(annotated, recipe)
    rows = [row for group in groups for row in group]
    ratings = head_values(rows, str(annotated))
    recipe = with_heads(recipe, ratings, head_entropies(ratings, reward_heads, len(rows)))
    plan = schedule(len(groups), params)
    processes = connect(params.device)
    policy = Policy(
        model,
        params.dtype,
        params.device,
        params.optimizer,
        len(plan),
        params.lora,
        params.seed,
        processes,
    )
    settings = step_settings(annotated, groups, params)
    if reference := load_reference(recipe, params.reference, policy.model, params.dtype, settings):
        reference.add_logprobs(rows, processes)
        del reference
    checkpoints = Checkpoints(resume, params.checkpoint, policy.optimizer, processes=processes)
    state = checkpoints.restore()
    metrics = Curve(resume / "curve.csv", state.curve, writes=processes.main)
    stopwatch = Stopwatch(resume, policy.optimizer.done, writes=processes.main)
    log.info("curve: %s", metrics.path)
    with progress(len(plan), "updates", "train_offline", policy.optimizer.done) as bar:
        for epoch, chosen in plan[policy.optimizer.done :]:
            rows = [row for index in chosen for row in groups[index]]
            with bad_batch_kept(rows, resume), stopwatch.phase("update"):
                batch = examples(rows, policy.model.device)
                measured = train_step(
                    policy.model, policy.optimizer, recipe, batch, settings, None, processes
                )
            metrics.add({"update": policy.optimizer.done, "epoch": epoch, **measured})
            with stopwatch.phase("checkpoint"):
                checkpoints.save_if_due(state)
            stopwatch.lap(int(batch.batch.lengths.sum()), update=policy.optimizer.done)
            bar.advance(1, f"loss {measured['loss']:.4f}, norm {measured['grad_norm']:.3f}")
    policy.save(load_tokenizer(model), out, checkpoints.best_weights(state.curve))
    if processes.main:
        metrics.write(curve)
        stopwatch.write(curve)
    processes.close()
    return (
        f"{len(plan)} updates of {method.title} over {len(groups)} groups, {params.epochs} epochs"
    )


def schedule(groups: int, params: TrainOfflineParams) -> list[tuple[int, list[int]]]:
    """Epoch (from 1) and indexes of the groups of every step: a permutation an epoch."""
    order = np.random.Generator(np.random.Philox(key=params.seed))
    plan = []
    for epoch in range(params.epochs):
        permutation = order.permutation(groups).tolist()
        plan += [
            (epoch + 1, permutation[start : start + params.prompts_per_update])
            for start in range(0, groups, params.prompts_per_update)
        ]
    return plan


def read_groups(annotated: Path, recipe: Recipe) -> list[Group]:
    """The table's rows by prompt, in order of first appearance; what the method needs is there."""
    rows = read_table(annotated, "annotated").to_pylist()
    if not rows:
        raise InputError(f"{annotated}: no rows to train on")
    check_columns(recipe, rows, str(annotated))
    groups: dict[str, Group] = {}
    for row in rows:
        if row["prompt_ids"] and row["completion_ids"]:
            groups.setdefault(row["prompt_id"], []).append(row)
    if len(rows) > (kept := sum(map(len, groups.values()))):
        log.warning("%s: %d rows without tokens are left out", annotated, len(rows) - kept)
    return list(groups.values())


def step_settings(annotated: Path, groups: list[Group], params: TrainOfflineParams) -> StepSettings:
    """Temperature and length limit as sampled; for tables made elsewhere 1 and the longest row."""
    sampling = provenance(annotated).get("sampling")
    if sampling is None:
        longest = max(len(row["completion_ids"]) for group in groups for row in group)
        log.info("%s: no provenance; temperature 1 and length limit %d", annotated, longest)
        return StepSettings(1.0, longest, params.token_budget, params.share_prompts)
    known = Sampling.model_validate(sampling)
    return StepSettings(
        known.temperature or 1.0, known.max_new_tokens, params.token_budget, params.share_prompts
    )
