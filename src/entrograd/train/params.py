"""Sections train_offline and train_online of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from entrograd.annotate.params import AnnotateParams
from entrograd.methods.params import MethodParams
from entrograd.params import Device, DType, Execution, Fraction, Positive, Section
from entrograd.rollout.params import RolloutParams


class Optimizer(Section):
    """AdamW and its schedule. `warmup_updates` rise linearly to `lr`, then `schedule`.
    `gradient_checkpointing` keeps the inputs of the layers alone and computes the rest again in
    the backward pass: less memory, more time, and prompts are not shared."""

    lr: Annotated[float, Field(gt=0)] = 1e-6
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_updates: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    gradient_checkpointing: bool = False

    # YAML has no tuples: a list of two is taken for one.
    @model_validator(mode="before")
    @classmethod
    def _betas(cls, data: object) -> object:
        if isinstance(data, dict) and isinstance(data.get("betas"), list):
            data = {**data, "betas": tuple(data["betas"])}
        return data


class Checkpoint(Section):
    """Unfinished training, kept in .entrograd/resume until the stage succeeds.

    One is written after every `every_updates`-th update, put off while writing them would take more
    than `max_fraction` of the time (1: never put off); the last `keep_last` are kept. `keep_best`
    names a column of the learning curve ("-loss": the lowest): the checkpoint at which it was best
    is kept as well, none is put off, and its weights are saved in the folder `best` of the trained
    model. `max_fraction` and `keep_last` may change while a run is unfinished: it is continued.
    """

    every_updates: Positive = 1
    max_fraction: Annotated[float, Field(gt=0, le=1), Execution] = 0.05
    keep_last: Annotated[Positive, Execution] = 2
    keep_best: str | None = None


class Lora(Section):
    """Adapters of `rank`, their product scaled by `alpha` / `rank`, beside the linear layers whose
    names are or end in one of `target_modules` (null: every one but the output head); the model's
    own weights stay as they are. What samples, and what is saved, is the model with the adapters
    added to its weights."""

    rank: Positive = 16
    alpha: Positive = 32
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None


class TrainParams(Section):
    """What both training stages have. `reference`: the folder of the model that penalties and
    implicit rewards are measured against, for methods that need one. `lora`: train adapters alone;
    null: all weights. `share_prompts`: compute each prompt once for its completions; null: if that
    saves tokens.
    """

    reference: str | None = None
    optimizer: Optimizer = Optimizer()
    lora: Lora | None = None
    token_budget: Annotated[Positive, Execution] = 16384
    share_prompts: bool | None = None
    seed: int = 0
    checkpoint: Checkpoint = Checkpoint()
    dtype: DType = "auto"
    device: Annotated[Device, Execution] = "auto"

    def files(self) -> list[str]:
        return [self.reference] if self.reference else []


class TrainOfflineParams(TrainParams):
    """Stage train_offline: epochs over the stored, annotated rollouts."""

    epochs: Annotated[int, Field(ge=0)] = 1
    prompts_per_update: Positive = 16


class MismatchGate(Section):
    """What the engine reports as a token's log-probability against what the trainer computes, in
    each step: the mean and the largest absolute difference and the KL divergence, in nats. Above
    a bound (null: none) the step is warned about, corrected by importance weights
    exp(old_logprobs - sampling_logprobs), or the run stops before the update. A method that always
    corrects (its own `importance_sampling`) is only warned about."""

    max_mean: Annotated[float, Field(gt=0)] | None = 0.05
    max_abs: Annotated[float, Field(gt=0)] | None = None
    max_kl: Annotated[float, Field(gt=0)] | None = 0.02
    action: Literal["warn", "correct", "stop"] = "warn"
    importance_sampling: Literal["truncated", "masked"] = "truncated"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    importance_sampling_cap: Annotated[float, Field(gt=0)] = 2.0


class DynamicSampling(Section):
    """DAPO's dynamic sampling (arXiv 2503.14476, Eq. 11): a step draws prompts until
    `prompts_per_round` groups have advantages, at most `max_factor` times as many prompts. How many
    it draws at a time follows the measured fraction of groups with signal, the newest one weighing
    `newest`. Groups too many are the next step's first."""

    max_factor: Annotated[float, Field(ge=1)] = 4.0
    newest: Annotated[float, Field(gt=0, le=1)] = 0.5


class HeldoutAccuracy(Section):
    """Accuracy of greedy completions of the first `problems` held-out prompts, measured before the
    first update of every `every_rounds`-th round, beginning with the first, and of the last."""

    every_rounds: Positive = 10
    problems: Positive = 128


class TrainOnlineParams(TrainParams):
    """Stage train_online: each round samples `prompts_per_round` groups, grades and annotates them
    and passes over them `epochs_per_round` times. A pass makes one update on the whole round, or,
    with `prompts_per_update`, one on each mini-batch of at most so many groups. A round that
    dynamic sampling leaves short is divided into as many mini-batches as any other, of fewer
    groups. `evaluate` (null: never) adds the column `heldout_accuracy` to the curve. Sampling,
    group size and grading are those of sections rollout and annotate.
    `prefetch`: a round is sampled while the updates of the round before it run, by the policy from
    before them; importance weights (the method's `importance_sampling`) make up for it. For
    engines vllm and vllm_server.
    """

    rounds: Annotated[int, Field(ge=0)] = 100
    prompts_per_round: Positive = 16
    prompts_per_update: Positive | None = None
    epochs_per_round: Positive = 1
    evaluate: HeldoutAccuracy | None = None
    prefetch: bool = False
    dynamic_sampling: DynamicSampling | None = None
    mismatch: MismatchGate = MismatchGate()

    @model_validator(mode="after")
    def _mini_batches(self) -> TrainOnlineParams:
        if (self.prompts_per_update or 1) > self.prompts_per_round:
            raise ValueError(
                f"prompts_per_update: {self.prompts_per_update} prompts, but a round has "
                f"{self.prompts_per_round} (prompts_per_round); lower it, or null: the whole round"
            )
        return self


class TrainOfflineStage(Section):
    """What stage train_offline reads."""

    method: MethodParams
    train_offline: TrainOfflineParams


class TrainOnlineStage(Section):
    """What stage train_online reads."""

    method: MethodParams
    rollout: RolloutParams
    annotate: AnnotateParams
    train_online: TrainOnlineParams
