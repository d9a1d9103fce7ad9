"""Stage train_online: rollout, grade, annotate, update, round after round."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from entrograd.annotate.completions import Prompts
from entrograd.annotate.params import AnnotateParams
from entrograd.annotate.reward_weights import read_entropies
from entrograd.methods.recipe import Recipe
from entrograd.methods.registry import recipe as choose
from entrograd.models.load import load_tokenizer
from entrograd.pipeline.progress import progress
from entrograd.rewards.verify.grade import Grader
from entrograd.rollout.engine import Engine
from entrograd.rollout.engines import check_processes, open_engine
from entrograd.rollout.rollout import encoded_prompts
from entrograd.train.batch import examples
from entrograd.train.checkpoint import Checkpoints, State
from entrograd.train.curve import Curve, Stopwatch, online_row, record
from entrograd.train.draw import Annotator, RoundDrawer, TrainingPrompts
from entrograd.train.forward_backward import StepSettings
from entrograd.train.heldout import Heldout
from entrograd.train.mismatch import gate, measure
from entrograd.train.params import TrainOnlineStage
from entrograd.train.policy import Policy, bad_batch_kept
from entrograd.train.prefetch import Prefetch
from entrograd.train.processes import connect
from entrograd.train.reference import load_reference
from entrograd.train.required_columns import check_required_columns, with_heads
from entrograd.train.rollout_source import RolloutSource
from entrograd.train.rounds import MiniBatches, PromptOrder, Rounds
from entrograd.train.scoring import Scoring
from entrograd.train.step import train_step

log = logging.getLogger("entrograd")


def train_online(
    params: TrainOnlineStage,
    model: Path,
    prompts: Path,
    out: Path,
    rounds: Path,
    curve: Path,
    resume: Path,
    *,
    reward_heads: Path | None = None,
) -> str:
    """Train the model in `model` on completions it draws itself; write weights, every round's
    annotated rollouts (a shard per round) and the learning curve. ENCORE's entropies are those in
    `reward_heads`. Unfinished work in `resume` is continued. Returns the one-line result."""
    online, recipe = params.train_online, _recipe(params, reward_heads)
    encoded = encoded_prompts(prompts, None, params.rollout, model, resume)
    heldout = Heldout(online, params.rollout, prompts, model)
    processes = connect(online.device)
    check_processes(params.rollout, processes.count)
    mini_batches = MiniBatches(online, len(encoded))
    per_round = mini_batches.updates
    policy = Policy.load(model, online, online.rounds * per_round, processes)
    device, optimizer = policy.model.device, policy.optimizer
    checkpoints = Checkpoints(resume, online.checkpoint, optimizer, processes)
    state = checkpoints.restore()
    metrics, stopwatch = record(resume, state.curve, optimizer.done, writes=processes.main)
    sampling, settings = params.rollout.sampling, _step_settings(params)
    stored = Rounds(resume, {"sampling": sampling.model_dump(), "engine": params.rollout.engine})
    reference = load_reference(recipe, online.reference, policy.model, online.dtype, settings)
    scoring = _scoring(policy, settings, params.annotate.token_budget, mini_batches.first)
    order = PromptOrder(len(encoded), online.prompts_per_round, online.seed)
    training = TrainingPrompts(encoded, Prompts(prompts), order)
    with (
        progress(online.rounds, "rounds", "train_online", optimizer.done // per_round) as bar,
        _engine(params, model, policy, resume) as engine,
        _annotator(params.annotate, training, scoring, stopwatch) as annotator,
        _source(
            RoundDrawer(params, recipe, policy, training, engine=engine, annotator=annotator),
            stored,
            heldout,
            state,
        ) as source,
    ):
        for update in range(optimizer.done, online.rounds * per_round):
            number, part = divmod(update, per_round)
            drawn = source.round(number, part)
            if reference:
                reference.add_logprobs(drawn.groups, processes)
            groups = mini_batches(drawn.groups, number, part)
            with bad_batch_kept(groups, resume), stopwatch.phase("update"):
                batch = examples(groups, device)
                mismatch = measure(batch.batch) if sampling.temperature else {}
                gated = gate(mismatch, online.mismatch, recipe, f"round {number + 1}")
                measured = train_step(policy, gated, batch, settings, source.cached_forward())
                if mismatch:
                    measured |= {**mismatch, "mismatch_corrected": float(gated is not recipe)}
            of_round, epoch = drawn.measured if part == 0 else {}, mini_batches.epoch(part)
            metrics.add(online_row(number + 1, update + 1, epoch, of_round, measured))
            if last := part + 1 == per_round:
                source.finish_round(policy)
                bar.advance(1, _note(metrics, drawn.measured["alarms"]))
            if last or not source.prefetch:  # what is drawn ahead is by weights that are gone
                state.data = source.position()
                with stopwatch.phase("checkpoint"):
                    checkpoints.save_if_due(state)
            stopwatch.lap(int(batch.batch.lengths.sum()), round=number + 1, update=update + 1)
    policy.save(load_tokenizer(model), out, checkpoints.best_weights(state.curve))
    if processes.main:
        stored.assemble(online.rounds, rounds)
        metrics.write(curve)
        stopwatch.write(curve)
    processes.close()
    first, end = metrics.ends("reward_mean")
    return f"{online.rounds} rounds of {params.method.title}, mean reward {first:.3f} -> {end:.3f}"


def _recipe(params: TrainOnlineStage, reward_heads: Path | None) -> Recipe:
    """The recipe, checked, with the entropies of the reward heads."""
    recipe, heads = choose(params.method), tuple(params.annotate.heads)
    check_required_columns(recipe, "train_online", params.train_online, heads)
    return with_heads(recipe, heads, read_entropies(reward_heads) if reward_heads else {})


def _step_settings(params: TrainOnlineStage) -> StepSettings:
    sampling, online = params.rollout.sampling, params.train_online
    return StepSettings(
        sampling.temperature or 1.0,
        sampling.max_new_tokens,
        online.token_budget,
        online.share_prompts,
    )


def _scoring(policy: Policy, settings: StepSettings, budget: int, first: int | None) -> Scoring:
    """What computes old_logprobs; `first`: groups of a round's first update (None: all)."""
    model = policy.sampler() if policy.processes.sharded else policy.model
    return Scoring(model, settings, budget, first)


def _engine(params: TrainOnlineStage, model: Path, policy: Policy, resume: Path) -> closing[Engine]:
    """The engine that draws from the policy, for as long as the context lives."""
    rank = policy.processes.rank
    return closing(open_engine(params.rollout, model, policy.sampler(), resume, rank))


@contextmanager
def _annotator(
    params: AnnotateParams, prompts: TrainingPrompts, scoring: Scoring, stopwatch: Stopwatch
) -> Iterator[Annotator]:
    """What annotates rounds; its grader lives as long as the context."""
    with Grader(params.grader) as grader:
        yield Annotator(params, prompts.rows, scoring, grader, stopwatch)


@contextmanager
def _source(
    drawer: RoundDrawer, stored: Rounds, heldout: Heldout, state: State
) -> Iterator[RolloutSource]:
    """The rounds from `state` on."""
    online, policy = drawer.params.train_online, drawer.policy
    with ExitStack() as running:
        prefetch = None
        if online.prefetch:
            sampler = state.data.get("sampler")
            prefetch = Prefetch(drawer, stored, policy.processes, online.rounds, sampler)
            running.callback(prefetch.close)
        source = RolloutSource(drawer, stored, heldout, prefetch)
        if state.data:
            drawer.prompts.order.restore(state.data["order"])
        if policy.optimizer.done:  # the engine may have started with the weights of the beginning
            source.update_weights(policy)
        yield source


def _note(metrics: Curve, alarms: float) -> str:
    note = f"reward {metrics.newest('reward_mean'):.3f}, loss {metrics.newest('loss'):.4f}"
    return f"{note}, alarms {alarms:.0f}" if alarms else note
