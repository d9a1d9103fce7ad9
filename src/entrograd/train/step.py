"""One optimiser update, whatever the method: advantages, loss by micro-batches, update."""

from __future__ import annotations

from entrograd.methods.batch import denominators
from entrograd.methods.diagnostics import diagnostics
from entrograd.methods.recipe import Recipe
from entrograd.train.batch import Examples
from entrograd.train.forward_backward import ForwardBackward, StepSettings
from entrograd.train.policy import Policy
from entrograd.train.scoring import CachedForward


def train_step(
    policy: Policy,
    recipe: Recipe,
    examples: Examples,
    settings: StepSettings,
    cached: CachedForward | None = None,
) -> dict[str, float]:
    """Update `policy` once on whole groups; returns the update's diagnostics.

    The advantages and the loss's denominators are those of the whole batch, so any split into
    micro-batches and processes gives the same gradient. Each of several processes calls this with
    the same batch and makes the same update. NonFiniteError, before the update, names the prompts.
    """
    batch, optimizer = examples.batch, policy.optimizer
    advantages = recipe.advantages(batch)
    loss_mask = recipe.loss_mask(batch)
    counts = denominators(batch, settings.max_length, loss_mask)
    passes = ForwardBackward(policy, examples, settings, cached)
    for rows in passes.micro_batches(advantages, recipe.penalised):
        logprobs = passes.logprobs(rows)
        token_loss = recipe.policy_loss(logprobs, advantages[rows], batch.select(rows))
        passes.backward(recipe.aggregate(token_loss, loss_mask[rows], counts), rows)
    loss, current, norm = passes.reduce()
    rate = optimizer.learning_rate()
    optimizer.step(norm)  # clips to max_grad_norm
    measured = diagnostics(recipe, batch, current, advantages)
    return {"loss": loss, "grad_norm": norm, "lr": rate, **measured}
