"""The mismatch between engine and trainer: two programs that compute the same logprobs, nearly."""

from __future__ import annotations

import logging

from entrograd.errors import InputError
from entrograd.methods.batch import Batch
from entrograd.methods.recipe import Recipe
from entrograd.numerics import kl
from entrograd.train.params import MismatchGate

log = logging.getLogger("entrograd")


def measure(batch: Batch) -> dict[str, float]:
    """mismatch_mean and mismatch_max of |old_logprobs - sampling_logprobs| over the trained
    tokens, and mismatch_kl, the k3 estimate of KL(engine || trainer), in nats; {} where the engine
    reported none."""
    if batch.sampling_logprobs is None:
        return {}
    engine = batch.sampling_logprobs[batch.completion_mask].double()
    trainer = batch.old_logprobs[batch.completion_mask].double()
    difference = (trainer - engine).abs()
    return {
        "mismatch_mean": float(difference.mean()),
        "mismatch_max": float(difference.max()),
        "mismatch_kl": float(kl.estimate("k3", engine, trainer).mean()),
    }


def gate(mismatch: dict[str, float], params: MismatchGate, recipe: Recipe, where: str) -> Recipe:
    """The recipe to update with: `recipe`, or above a bound the same with importance weights.

    Raises:
        InputError: above a bound where params.action is stop.
    """
    bounds = {
        "mismatch_mean": params.max_mean,
        "mismatch_max": params.max_abs,
        "mismatch_kl": params.max_kl,
    }
    above = [
        f"{name} {mismatch[name]:.4g} above {bound:.4g}"
        for name, bound in bounds.items()
        if bound is not None and name in mismatch and not mismatch[name] <= bound
    ]
    if not above:
        return recipe
    message = f"{where}: engine and trainer disagree on logprobs: {', '.join(above)} nats"
    if params.action == "stop":
        raise InputError(
            f"{message}; give both the same dtype (rollout.dtype, train_online.dtype), or set "
            "train_online.mismatch.action: correct"
        )
    if params.action == "warn" or recipe.importance_sampling:
        log.warning("%s", message)
        return recipe
    log.warning("%s: this step is corrected (%s)", message, params.importance_sampling)
    return recipe.with_importance_sampling(
        params.importance_sampling,
        params.importance_sampling_level,
        params.importance_sampling_cap,
    )
