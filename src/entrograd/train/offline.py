"""Stage train_offline: epochs over stored, annotated rollouts, with clipped importance ratios."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import numpy as np

from entrograd.annotate.reward_weights import head_entropies
from entrograd.methods.params import MethodParams
from entrograd.methods.registry import recipe as choose
from entrograd.models.load import load_tokenizer
from entrograd.pipeline.progress import progress
from entrograd.rollout.params import Sampling
from entrograd.storage.tables import provenance
from entrograd.train.batch import examples
from entrograd.train.checkpoint import Checkpoints
from entrograd.train.curve import record
from entrograd.train.forward_backward import StepSettings
from entrograd.train.params import TrainOfflineParams
from entrograd.train.policy import Policy, bad_batch_kept
from entrograd.train.processes import connect
from entrograd.train.reference import load_reference
from entrograd.train.required_columns import check_columns, check_required_columns, with_heads
from entrograd.train.step import train_step
from entrograd.train.stored_groups import StoredGroups

log = logging.getLogger("entrograd")


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
    groups = StoredGroups(annotated, resume, partial(check_columns, recipe, where=str(annotated)))
    entropies = head_entropies(groups.ratings, reward_heads, groups.completions)
    recipe = with_heads(recipe, groups.ratings, entropies)
    plan = schedule(len(groups), params)
    processes = connect(params.device)
    policy = Policy.load(model, params, len(plan), processes)
    settings = step_settings(annotated, groups.longest, params)
    if reference := load_reference(recipe, params.reference, policy.model, params.dtype, settings):
        groups.add("ref_logprobs", partial(reference.add_logprobs, processes=processes))
        del reference
    checkpoints = Checkpoints(resume, params.checkpoint, policy.optimizer, processes=processes)
    state = checkpoints.restore()
    metrics, stopwatch = record(resume, state.curve, policy.optimizer.done, writes=processes.main)
    with progress(len(plan), "updates", "train_offline", policy.optimizer.done) as bar:
        for epoch, indexes in plan[policy.optimizer.done :]:
            due = [groups[index] for index in indexes]
            with bad_batch_kept(due, resume), stopwatch.phase("update"):
                batch = examples(due, policy.model.device)
                measured = train_step(policy, recipe, batch, settings)
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
    """Epoch (from 1) and indexes of the groups of every update: a permutation per epoch."""
    order = np.random.Generator(np.random.Philox(key=params.seed))
    plan = []
    for epoch in range(params.epochs):
        permutation = order.permutation(groups).tolist()
        plan += [
            (epoch + 1, permutation[start : start + params.prompts_per_update])
            for start in range(0, groups, params.prompts_per_update)
        ]
    return plan


def step_settings(annotated: Path, longest: int, params: TrainOfflineParams) -> StepSettings:
    """Temperature and length limit as sampled; for tables made elsewhere 1 and the `longest`."""
    sampling = provenance(annotated).get("sampling")
    if sampling is None:
        log.info("%s: no provenance; temperature 1 and length limit %d", annotated, longest)
        return StepSettings(1.0, longest, params.token_budget, params.share_prompts)
    known = Sampling.model_validate(sampling)
    return StepSettings(
        known.temperature or 1.0, known.max_new_tokens, params.token_budget, params.share_prompts
    )
