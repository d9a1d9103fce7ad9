"""The gap between engine and trainer: two programs that compute the same logprobs, nearly."""

from __future__ import annotations

import logging
from dataclasses import replace

from entrograd.errors import InputError
from entrograd.methods.base import Batch, Recipe
from entrograd.numerics import kl
from entrograd.params import GapGate

log = logging.getLogger("entrograd")


def measure(batch: Batch) -> dict[str, float]:
    """gap_mean and gap_max of |old_logprobs - sampling_logprobs| over the trained tokens, and
    gap_kl, the k3 estimate of KL(engine || trainer), in nats; {} where the engine reported none."""
    if batch.sampling_logprobs is None:
        return {}
    engine = batch.sampling_logprobs[batch.completion_mask].double()
    trainer = batch.old_logprobs[batch.completion_mask].double()
    difference = (trainer - engine).abs()
    return {
        "gap_mean": float(difference.mean()),
        "gap_max": float(difference.max()),
        "gap_kl": float(kl.estimate("k3", engine, trainer).mean()),
    }


def gate(gap: dict[str, float], params: GapGate, recipe: Recipe, where: str) -> Recipe:
    """The recipe to update with: `recipe`, or above a bound the same with importance weights.

    Raises:
        InputError: above a bound where params.action is stop.
    """
    bounds = {"gap_mean": params.max_mean, "gap_max": params.max_abs, "gap_kl": params.max_kl}
    above = [
        f"{name} {gap[name]:.4g} above {bound:.4g}"
        for name, bound in bounds.items()
        if bound is not None and name in gap and not gap[name] <= bound
    ]
    if not above:
        return recipe
    message = f"{where}: engine and trainer disagree on logprobs: {', '.join(above)} nats"
    if params.action == "stop":
        raise InputError(
            f"{message}; give both the same dtype (rollout.dtype, train_online.dtype), or set "
            "train_online.gap.action: correct"
        )
    name = recipe.loss.name
    if params.action == "warn" or recipe.params[name].correction != "none":
        log.warning("%s", message)
        return recipe
    log.warning("%s: this step is corrected (%s)", message, params.correction)
    corrected = replace(
        recipe.params[name],
        correction=params.correction,
        correction_level=params.correction_level,
        correction_cap=params.correction_cap,
    )
    return replace(recipe, params={**recipe.params, name: corrected})
