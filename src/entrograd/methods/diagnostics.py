"""What a step did, in numbers named as the field names them. Cheap: no forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from entrograd.methods.batch import Batch
from entrograd.methods.recipe import Recipe
from entrograd.methods.semantic_entropy import group_entropy
from entrograd.numerics import groups, kl, masked, surrogate

QUANTILES = (0.1, 0.5, 0.9)


def diagnostics(
    recipe: Recipe, batch: Batch, logprobs: Tensor, advantages: Tensor
) -> dict[str, float]:
    """Measurements of one optimiser step over its whole batch; keys whose input is absent are left
    out, so that every value is a finite number.

    Args:
        recipe: what computed the advantages.
        batch: the whole optimiser batch.
        logprobs: [B, T] nats, of the policy that was differentiated; a token that was left out of
            the forward pass may hold its old logprob.
        advantages: [B, T] as recipe.advantages gave them.
    """
    with torch.no_grad():
        measured = {
            **_reward(recipe, batch, advantages),
            **_policy(recipe, batch, logprobs, advantages),
            **_entropy(batch),
            **_prompts(recipe, batch),
            **_advantages(recipe, batch, advantages),
        }
        return {name: float(value) + 0.0 for name, value in measured.items()}


def _reward(recipe: Recipe, batch: Batch, advantages: Tensor) -> dict[str, Tensor]:
    """reward_mean, as graded; length_mean: trained tokens per completion; zero_signal_fraction:
    fraction of groups whose advantages are all zero; weight_NAME: what each head weighs in the
    reward."""
    silent = groups.totals((advantages != 0).any(-1), batch.groups) == 0
    weights = recipe.reward.head_weights(batch.head_names)
    return {
        "reward_mean": batch.rewards.double().mean(),
        "length_mean": batch.lengths.double().mean(),
        "zero_signal_fraction": _group_mean(silent.double(), batch),
        **{f"weight_{name}": torch.tensor(weights[name], dtype=torch.float64) for name in weights},
    }


def _policy(
    recipe: Recipe, batch: Batch, logprobs: Tensor, advantages: Tensor
) -> dict[str, Tensor]:
    """clip_low, clip_high: fraction of trained tokens whose ratio, the one the policy loss clips,
    is below (above) its bound while the advantage is negative (positive), so that they give no
    gradient. weight_capped, of a loss that clips a weight (CISPO): fraction of trained tokens with
    an advantage whose weight is the bound; they keep their gradient.
    kl (by k3), kl_k1: KL(old || current) in nats per token, over the old policy's samples;
    kl_ref: KL(current || reference) by k3. log_ratio_max: the largest |log ratio| of a token."""
    mask = batch.completion_mask
    logs = surrogate.log_ratio(logprobs, batch.old_logprobs, mask).double()
    measured = {
        "kl_k1": -_token_mean(logs, mask),
        "kl": _token_mean(kl.k3(torch.zeros_like(logs), logs), mask),
        "log_ratio_max": logs.abs().max(),
    }
    if batch.ref_logprobs is not None:
        now, reference = masked.fill(logprobs, mask), masked.fill(batch.ref_logprobs, mask)
        measured["kl_ref"] = _token_mean(kl.k3(now.double(), reference.double()), mask)
    for name, tokens in recipe.loss.clipped(logprobs, advantages, batch).items():
        measured[name] = _token_mean(tokens.double(), mask)
    return measured


def _entropy(batch: Batch) -> dict[str, Tensor]:
    """entropy_mean and entropy_q10, _q50, _q90: token entropies of the sampling policy, nats."""
    if batch.entropies is None or not batch.completion_mask.any():
        return {}
    values, mask = batch.entropies.double(), batch.completion_mask
    quantiles = {f"entropy_q{q * 100:.0f}": masked.quantile(values, mask, q) for q in QUANTILES}
    return {"entropy_mean": _token_mean(values, mask), **quantiles}


def _prompts(recipe: Recipe, batch: Batch) -> dict[str, Tensor]:
    """semantic_entropy: mean over groups, nats; weighting_mean, _min: the factor on a group's
    advantages."""
    measured: dict[str, Tensor] = {}
    if batch.cluster_ids is not None:
        entropy = group_entropy(batch, recipe.estimator)
        measured["semantic_entropy"] = _group_mean(entropy, batch)
    if recipe.weighting.name != "none":
        weights = recipe.weighting.weights(batch)
        measured["weighting_mean"] = _group_mean(weights.double(), batch)
        measured["weighting_min"] = weights.min()
    return measured


def _advantages(recipe: Recipe, batch: Batch, advantages: Tensor) -> dict[str, Tensor]:
    """Over tokens: advantage_correct, advantage_wrong: means; positive_correct, negative_wrong:
    fraction of correct (wrong) completions' tokens, in groups whose (composed) rewards differ,
    whose advantage has the right sign; kept_tokens: fraction of tokens with an advantage in those
    groups, also where a mask leaves none; nonzero_tokens: the same over all tokens."""
    mask, correct = batch.completion_mask, batch.correct[:, None]
    measured = {"nonzero_tokens": _token_mean((advantages != 0).double(), mask)}
    for name, chosen in (("correct", mask & correct), ("wrong", mask & ~correct)):
        if chosen.any():
            measured[f"advantage_{name}"] = _token_mean(advantages.double(), chosen)
    equal = groups.all_equal(recipe.rewarded(batch).rewards, batch.groups)
    signal = mask & ~equal[:, None]
    for name, fraction, chosen in (
        ("positive_correct", advantages > 0, signal & correct),
        ("negative_wrong", advantages < 0, signal & ~correct),
        ("kept_tokens", advantages != 0, signal),
    ):
        if chosen.any():
            measured[name] = _token_mean(fraction.double(), chosen)
    return measured


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    return masked.sums(values, mask).sum() / mask.sum().clamp(min=1)


def _group_mean(values: Tensor, batch: Batch) -> Tensor:
    """The mean over groups of a value [B] that is the same for all completions of one."""
    once = 1 / groups.sizes(batch.groups)
    return (values * once).sum() / once.sum()
