"""Stage train_online: rollout, grade, annotate, update, round after round."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from entrograd.annotate.completions import Prompts
from entrograd.annotate.reward_weights import read_entropies
from entrograd.methods.registry import recipe as choose
from entrograd.models.load import load_tokenizer
from entrograd.pipeline.progress import progress
from entrograd.rewards.verify.grade import Grader
from entrograd.rollout.engines import check_processes, open_engine
from entrograd.rollout.rollout import encoded_prompts
from entrograd.storage.files import write_csv
from entrograd.train.batch import examples
from entrograd.train.checkpoint import Checkpoints
from entrograd.train.draw import RoundDrawer
from entrograd.train.mismatch import gate, measure
from entrograd.train.params import TrainOnlineStage
from entrograd.train.prefetch import Prefetch
from entrograd.train.processes import connect
from entrograd.train.reference import load_reference
from entrograd.train.required_columns import check_required_columns, with_heads
from entrograd.train.rollout_source import RolloutSource
from entrograd.train.rounds import PromptOrder, Rounds
from entrograd.train.scoring import Scoring
from entrograd.train.setup import Policy, bad_batch_kept
from entrograd.train.step import StepSettings, train_step


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
    annotated rollouts (a shard a round) and the learning curve. ENCORE's entropies are those in
    `reward_heads`. Unfinished work in `resume` is continued. Returns the one-line result."""
    online, recipe = params.train_online, choose(params.method)
    heads = tuple(params.annotate.heads)
    check_required_columns(recipe, "train_online", online, heads)
    recipe = with_heads(recipe, heads, read_entropies(reward_heads) if reward_heads else {})
    tokenizer = load_tokenizer(model)
    rows = encoded_prompts(prompts, None, params.rollout, model, resume)
    per_round = online.epochs_per_round
    updates = online.rounds * per_round
    processes = connect(online.device)
    check_processes(params.rollout, processes.count)
    policy = Policy(
        model,
        online.dtype,
        online.device,
        online.optimizer,
        updates,
        online.lora,
        online.seed,
        processes,
    )
    order = PromptOrder(len(rows), online.prompts_per_round, online.seed)
    checkpoints = Checkpoints(resume, online.checkpoint, policy.optimizer, per_round, processes)
    state = checkpoints.restore()
    if state.data:
        order.restore(state.data["order"])
    sampling = params.rollout.sampling
    temperature = sampling.temperature or 1.0
    settings = StepSettings(
        temperature, sampling.max_new_tokens, online.token_budget, online.share_prompts
    )
    kept = Rounds(resume, {"sampling": sampling.model_dump(), "engine": params.rollout.engine})
    reference = load_reference(recipe, online.reference, policy.model, online.dtype, settings)
    scoring = Scoring(
        policy.sampler() if processes.sharded else policy.model,
        temperature,
        online.token_budget,
        params.annotate.token_budget,
        online.share_prompts,
    )
    # what scoring keeps is of one draw's rows, in one process: useful where those are the round
    whole_graph = online.dynamic_sampling is None and processes.count == 1

    with (
        progress(
            online.rounds, "rounds", "train_online", policy.optimizer.done // per_round
        ) as bar,
        Grader(params.annotate.grader) as grader,
        closing(
            open_engine(params.rollout, model, policy.sampler(), resume, processes.rank)
        ) as engine,
        ExitStack() as running,
    ):
        drawer = RoundDrawer(
            params,
            recipe,
            rows,
            Prompts(prompts),
            order,
            engine,
            scoring,
            grader,
            processes,
            policy.model.device,
        )
        ahead: Prefetch | None = None
        if online.prefetch:
            ahead = Prefetch(drawer, kept, processes, online.rounds, state.data.get("sampler"))
            running.callback(ahead.close)
        if policy.optimizer.done:  # it may have started with the weights in `model`
            engine.update_weights(policy.sampler())
            processes.wait()
        supply = RolloutSource(
            drawer,
            kept,
            ahead,
            dynamic=online.dynamic_sampling is not None,
            keep_graph=whole_graph,
        )
        for update in range(policy.optimizer.done, updates):
            number, part = divmod(update, per_round)
            drawn = supply.round(number, part)
            if reference:
                reference.add_logprobs(drawn.rows, processes)
            with bad_batch_kept(drawn.rows, resume):
                batch = examples(drawn.rows, policy.model.device)
                mismatch = measure(batch.batch) if sampling.temperature else {}
                gated = gate(mismatch, online.mismatch, recipe, f"round {number + 1}")
                scored = scoring.take()
                measured = train_step(
                    policy.model,
                    policy.optimizer,
                    gated,
                    batch,
                    settings,
                    scored if whole_graph else None,
                    processes,
                )
                measured |= (
                    {**mismatch, "mismatch_corrected": float(gated is not recipe)}
                    if mismatch
                    else {}
                )
            if part + 1 == per_round:
                if ahead:
                    ahead.finish()
                engine.update_weights(policy.sampler())
                processes.wait()
                state.curve.append({"round": number + 1, **drawn.measured, **measured})
                reward, alarms = drawn.measured["reward_mean"], drawn.measured["alarms"]
                note = f"reward {reward:.3f}, loss {measured['loss']:.4f}"
                bar.advance(1, f"{note}, alarms {alarms:.0f}" if alarms else note)
            state.data = {"order": order.position(), "policy_version": engine.policy_version}
            if ahead:
                if part + 1 < per_round:  # what is being drawn is by weights that are gone
                    continue
                state.data["sampler"] = ahead.sampler
            checkpoints.save_if_due(state)
    policy.save(tokenizer, out, checkpoints.best_weights(state.curve))
    if processes.main:
        kept.assemble(online.rounds, rounds)
        write_csv(curve, state.curve)
    processes.close()
    first, last = (np.mean([r["reward_mean"] for r in part]) for part in _ends(state.curve))
    return f"{online.rounds} rounds of {params.method.title}, mean reward {first:.3f} -> {last:.3f}"


def _ends(rows: list[dict[str, float]]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    count = max(1, len(rows) // 10)
    return rows[:count], rows[-count:]
