"""Every metric of training, once: the columns of the learning curves and of the speed files, the
report's labels and docs/metrics.md come from here. A new metric is a line here and whoever
measures it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One metric: a column of a learning curve, or of a speed file.

    label: in a figure's legend.
    unit: '' for a plain number.
    of: a `round` metric has a value in the row of the round's first update, an `update` metric in
        every row. Both measure the policy before the update.
    meaning: one or two sentences.
    better: what an improvement is; None if neither direction is.
    """

    name: str
    label: str
    unit: str
    of: Literal["round", "update"]
    meaning: str
    better: Literal["higher", "lower"] | None = None


# fmt: off
PLACES = (
    Metric("round", "round", "", "update", "Number of the round, from 1; online."),
    Metric("update", "update", "", "update", "Number of the update, from 1."),
    Metric("epoch", "epoch", "", "update", "Pass over the data, offline, or the round, from 1."),
)

ROUND = (
    Metric("reward_mean", "mean reward", "mean reward", "round",
           "Mean reward, as graded, of all completions the round drew; offline, of the update's "
           "batch. With dynamic sampling this is what the policy achieves, and it is empty if"
           " the round before left enough groups and nothing was drawn.", "higher"),
    Metric("semantic_entropy", "semantic entropy", "entropy, nats", "round",
           "Mean over all groups the round drew, by the estimator rao: 0 where all completions "
           "of a group give the same answer. Offline, over the update's groups, by "
           "seed_grpo.estimator."),
    Metric("no_answer_fraction", "no answer", "fraction of completions", "round",
           "Drawn completions in which no answer was found.", "lower"),
    Metric("truncated_fraction", "truncated", "fraction of completions", "round",
           "Drawn completions that ended at the length limit without an answer.", "lower"),
    Metric("timeout_fraction", "timeout", "fraction of completions", "round",
           "Drawn completions whose comparison took too long.", "lower"),
    Metric("alarms", "alarms", "alarms", "round",
           "Alarms that the drawn completions raised (docs/annotation.md).", "lower"),
    Metric("groups_drawn", "drawn", "groups", "round",
           "Dynamic sampling: groups drawn for the round.", "lower"),
    Metric("groups_carried", "carried over", "groups", "round",
           "Dynamic sampling: groups that the round before left."),
    Metric("signal_fraction", "with signal", "fraction of groups", "round",
           "Dynamic sampling: groups expected to have an advantage, as the next round is "
           "planned.", "higher"),
    Metric("draws", "draws", "draws", "round", "Dynamic sampling: calls of the engine.", "lower"),
    Metric("heldout_accuracy", "held-out accuracy", "accuracy", "round",
           "Share of held-out problems solved greedily, in rounds in which it was measured "
           "(train_online.evaluate).", "higher"),
)

UPDATE = (
    Metric("loss", "loss", "loss", "update",
           "The policy loss that is differentiated. It gives a direction and is no score: it "
           "need not fall."),
    Metric("grad_norm", "gradient norm", "L2 norm", "update",
           "Norm of the gradient of all weights, before clipping."),
    Metric("lr", "learning rate", "", "update", "Learning rate of the update."),
    Metric("batch_reward_mean", "of the batch", "mean reward", "update",
           "Online: mean reward, as graded, of the completions trained on."),
    Metric("length_mean", "mean length", "tokens per completion", "update",
           "Trained tokens per completion."),
    Metric("zero_signal_fraction", "no signal", "fraction of groups", "update",
           "Groups whose advantages are all zero, as when all rewards are equal.", "lower"),
    Metric("kl_k1", "KL (k1)", "KL, nats per token", "update",
           "KL divergence of the trained policy from the one that drew the completions, k1 "
           "estimate."),
    Metric("kl", "KL", "KL, nats per token", "update",
           "KL divergence of the trained policy from the one that drew the completions, k3 "
           "estimate."),
    Metric("log_ratio_max", "largest log-ratio", "nats", "update",
           "Largest absolute log-ratio of a token between those two policies."),
    Metric("kl_ref", "KL", "KL, nats per token", "update",
           "KL divergence of the trained policy from the reference model, k3 estimate; if "
           "there is one."),
    Metric("clip_low", "below the bound", "fraction of tokens", "update",
           "Trained tokens without gradient because the ratio that the loss clips (the token's, "
           "or the sequence's in GSPO and GRPO-S) is below its bound and the advantage negative."),
    Metric("clip_high", "above the bound", "fraction of tokens", "update",
           "The same if the ratio is above its bound and the advantage positive."),
    Metric("weight_capped", "at the bound", "fraction of tokens", "update",
           "CISPO, in place of clip_low and clip_high: trained tokens with an advantage whose "
           "importance weight is the bound; they keep their gradient."),
    Metric("entropy_mean", "mean", "entropy, nats", "update",
           "Entropy of the policy that sampled the completions, mean over trained tokens. "
           "Offline these are the stored completions, so it shows the data; online, a fall to "
           "zero means that the model has stopped exploring."),
    Metric("entropy_q10", "10 % quantile", "entropy, nats", "update", "Its 10 % quantile."),
    Metric("entropy_q50", "median", "entropy, nats", "update", "Its median."),
    Metric("entropy_q90", "90 % quantile", "entropy, nats", "update", "Its 90 % quantile."),
    Metric("weight_HEAD", "weight of HEAD", "weight", "update",
           "A column per reward head, by its name: what it weighs in the composed reward."),
    Metric("batch_semantic_entropy", "of the batch", "entropy, nats", "update",
           "Online: mean semantic entropy of the groups trained on, by seed_grpo.estimator."),
    Metric("weighting_mean", "mean", "multiplier", "update",
           "Mean factor of the prompt weighting on a group's advantages."),
    Metric("weighting_min", "smallest", "multiplier", "update", "The smallest factor of a group."),
    Metric("nonzero_tokens", "with an advantage", "fraction of tokens", "update",
           "Trained tokens whose advantage is not zero."),
    Metric("advantage_correct", "correct", "advantage", "update",
           "Mean advantage of the tokens of correct completions."),
    Metric("advantage_wrong", "wrong", "advantage", "update",
           "Mean advantage of the tokens of wrong completions."),
    Metric("positive_correct", "correct, positive", "fraction of tokens", "update",
           "Tokens of correct completions that are pushed up, in groups whose composed rewards "
           "differ."),
    Metric("negative_wrong", "wrong, negative", "fraction of tokens", "update",
           "Tokens of wrong completions that are pushed down, in the same groups."),
    Metric("kept_tokens", "kept", "fraction of tokens", "update",
           "Tokens with an advantage in the same groups: what a mask (ASR, high-entropy tokens) "
           "leaves in the loss."),
    Metric("mismatch_mean", "mean", "nats", "update",
           "Mean absolute difference between a token's log-probability as the engine reported it"
           " and as the trainer computes it; if the engine reports them.", "lower"),
    Metric("mismatch_max", "largest", "nats", "update", "The largest such difference.", "lower"),
    Metric("mismatch_kl", "KL", "KL, nats per token", "update",
           "KL divergence of the trainer's policy from the engine's, k3 estimate.", "lower"),
    Metric("mismatch_corrected", "corrected", "", "update",
           "1 if train_online.mismatch corrected the update by importance weights, else 0."),
)

SPEED = (
    Metric("seconds_sample", "sampling", "seconds", "update", "Sampling completions.", "lower"),
    Metric("seconds_annotate", "annotating", "seconds", "update",
           "Grading, scoring and clustering them.", "lower"),
    Metric("seconds_evaluate", "evaluating", "seconds", "update", "Held-out accuracy.", "lower"),
    Metric("seconds_update", "updating", "seconds", "update", "The optimiser step.", "lower"),
    Metric("seconds_checkpoint", "checkpointing", "seconds", "update",
           "Writing and removing checkpoints.", "lower"),
    Metric("seconds", "in all", "seconds", "update",
           "Wall-clock time since the row before; phases that overlap (prefetch) add up to more.",
           "lower"),
    Metric("tokens", "tokens", "tokens", "update", "Completion tokens trained on."),
    Metric("tokens_per_second", "tokens per second", "tokens per second", "update",
           "`tokens` per second of `seconds`.", "higher"),
    Metric("peak_memory", "peak memory", "MiB", "update",
           "Largest memory of the process so far: of the GPU if it has one, else of the "
           "machine.", "lower"),
)
# fmt: on

CURVE = {metric.name: metric for metric in (*PLACES, *ROUND, *UPDATE)}
METRICS = CURVE | {metric.name: metric for metric in SPEED}
# What a batch and the round it comes from both have: online the batch's gets `batch_` before it.
OF_BATCH = {name.removeprefix("batch_"): name for name in CURVE if name.startswith("batch_")}
_ORDER = {name: number for number, name in enumerate(METRICS)}


def metric(name: str) -> Metric:
    """The metric of that name; weight_NAME is one for any name of a reward head. KeyError for a
    name that is none."""
    if name not in METRICS and name.startswith("weight_"):
        return METRICS["weight_HEAD"]
    return METRICS[name]


def ordered(names: Iterable[str]) -> list[str]:
    """Each name once, in the order of the registry; reward heads as they come. KeyError for a name
    that is no metric."""
    return sorted(dict.fromkeys(names), key=lambda name: _ORDER[metric(name).name])
