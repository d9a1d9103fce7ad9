"""What a step did, in numbers named as the field names them. Cheap: no forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from entrograd.methods.base import Batch, Recipe, no_modulation
from entrograd.methods.seed_grpo import group_entropy
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
        found = {
            **_reward(batch, advantages),
            **_policy(recipe, batch, logprobs, advantages),
            **_entropy(batch),
            **_modulation(recipe, batch),
            **_advantages(recipe, batch, advantages),
        }
        return {name: float(value) + 0.0 for name, value in found.items()}


def _reward(batch: Batch, advantages: Tensor) -> dict[str, Tensor]:
    """reward_mean, as graded; zero_signal_fraction: share of groups whose advantages are all
    zero; length_mean: trained tokens a completion."""
    silent = groups.totals((advantages != 0).any(-1), batch.groups) == 0
    return {
        "reward_mean": batch.rewards.double().mean(),
        "length_mean": batch.lengths.double().mean(),
        "zero_signal_fraction": _group_mean(silent.double(), batch),
    }


def _policy(
    recipe: Recipe, batch: Batch, logprobs: Tensor, advantages: Tensor
) -> dict[str, Tensor]:
    """clip_low, clip_high: share of trained tokens whose ratio, the one the policy loss clips, is
    below (above) its bound while the advantage is negative (positive), so that they give no
    gradient. weight_capped, of a loss that clips a weight (CISPO): share of trained tokens with an
    advantage whose weight is the bound; they keep their gradient.
    kl (by k3), kl_k1: KL(old || current) in nats a token, over the old policy's samples;
    kl_ref: KL(current || reference) by k3. log_ratio_max: the largest |log ratio| of a token."""
    mask = batch.completion_mask
    logs = surrogate.log_ratio(logprobs, batch.old_logprobs, mask).double()
    params = recipe.params[recipe.loss.name]
    found = {
        "kl_k1": -_token_mean(logs, mask),
        "kl": _token_mean(kl.k3(torch.zeros_like(logs), logs), mask),
        "log_ratio_max": logs.abs().max(),
    }
    if batch.ref_logprobs is not None:
        now, reference = masked.fill(logprobs, mask), masked.fill(batch.ref_logprobs, mask)
        found["kl_ref"] = _token_mean(kl.k3(now.double(), reference.double()), mask)
    low, high = getattr(params, "clip_low", None), getattr(params, "clip_high", None)
    ratio = recipe.loss.ratio(logprobs, batch.old_logprobs, mask)
    if low is not None:
        below = (ratio < 1 - low) & (advantages < 0)
        found["clip_low"] = _token_mean(below.double(), mask)
    if high is not None and recipe.loss.clips_weight:
        capped = (ratio > 1 + high) & (advantages != 0)
        found["weight_capped"] = _token_mean(capped.double(), mask)
    elif high is not None:
        above = (ratio > 1 + high) & (advantages > 0)
        found["clip_high"] = _token_mean(above.double(), mask)
    return found


def _entropy(batch: Batch) -> dict[str, Tensor]:
    """entropy_mean and entropy_q10, _q50, _q90: token entropies of the sampling policy, nats."""
    if batch.entropies is None or not batch.completion_mask.any():
        return {}
    values, mask = batch.entropies.double(), batch.completion_mask
    quantiles = {f"entropy_q{q * 100:.0f}": masked.quantile(values, mask, q) for q in QUANTILES}
    return {"entropy_mean": _token_mean(values, mask), **quantiles}


def _modulation(recipe: Recipe, batch: Batch) -> dict[str, Tensor]:
    """semantic_entropy: mean over groups, nats, by seed_grpo's estimator; weighting_mean, _min:
    the multiplier of a group's advantages; weight_NAME: what each head weighs in the reward."""
    found: dict[str, Tensor] = {}
    if recipe.reward.head_weights is not None:
        params = recipe.params[recipe.reward.name]
        weights = recipe.reward.head_weights(batch.head_names, params)
        found |= {
            f"weight_{name}": torch.tensor(weight, dtype=torch.float64)
            for name, weight in weights.items()
        }
    if batch.cluster_ids is not None:
        estimator = recipe.params["seed_grpo"].estimator
        found["semantic_entropy"] = _group_mean(group_entropy(batch, estimator), batch)
    if recipe.modulation.modulate is not no_modulation:
        factor = recipe.modulation.modulate(batch, recipe.params[recipe.modulation.name])
        found["weighting_mean"] = _group_mean(factor.double(), batch)
        found["weighting_min"] = factor.min()
    return found


def _advantages(recipe: Recipe, batch: Batch, advantages: Tensor) -> dict[str, Tensor]:
    """Over tokens: advantage_correct, advantage_wrong: means; positive_correct, negative_wrong:
    share of correct (wrong) completions' tokens, in groups whose (composed) rewards differ, whose
    advantage has the right sign; kept_tokens: share of tokens with an advantage in those groups,
    also where a mask leaves none; nonzero_tokens: the same over all tokens."""
    mask, correct = batch.completion_mask, batch.correct[:, None]
    found = {"nonzero_tokens": _token_mean((advantages != 0).double(), mask)}
    for name, chosen in (("correct", mask & correct), ("wrong", mask & ~correct)):
        if chosen.any():
            found[f"advantage_{name}"] = _token_mean(advantages.double(), chosen)
    equal = groups.all_equal(recipe.rewarded(batch).rewards, batch.groups)
    signal = mask & ~equal[:, None]
    for name, share, chosen in (
        ("positive_correct", advantages > 0, signal & correct),
        ("negative_wrong", advantages < 0, signal & ~correct),
        ("kept_tokens", advantages != 0, signal),
    ):
        if chosen.any():
            found[name] = _token_mean(share.double(), chosen)
    return found


def _token_mean(values: Tensor, mask: Tensor) -> Tensor:
    return masked.sums(values, mask).sum() / mask.sum().clamp(min=1)


def _group_mean(values: Tensor, batch: Batch) -> Tensor:
    """The mean over groups of a value that is one a group, given a completion: [B] -> scalar."""
    once = 1 / groups.sizes(batch.groups)
    return (values * once).sum() / once.sum()
