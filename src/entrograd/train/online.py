"""Stage train_online: rollout, grade, annotate, update, round after round."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from entrograd import io
from entrograd.annotate.annotate import annotate_rows
from entrograd.annotate.clusters import Clusterer, clusterer
from entrograd.annotate.reward_weights import read_entropies
from entrograd.methods import recipe as choose
from entrograd.models.load import load_tokenizer
from entrograd.params import Params
from entrograd.progress import progress
from entrograd.rollout.engine import Engine
from entrograd.rollout.engines import open_engine
from entrograd.rollout.rollout import group_requests, rollout_rows, training_prompts
from entrograd.train.batch import examples
from entrograd.train.checkpoint import Checkpoints
from entrograd.train.dynamic import Filled, Group, by_group, fill, has_signal
from entrograd.train.gap import gate, measure
from entrograd.train.needs import check_columns, check_needs, with_heads
from entrograd.train.processes import connect
from entrograd.train.reference import load_reference
from entrograd.train.rounds import PromptOrder, Round, Rounds, round_seed
from entrograd.train.scoring import Scoring
from entrograd.train.setup import Policy, bad_batch_kept
from entrograd.train.step import StepSettings, train_step
from entrograd.verify.grade import Grader


def train_online(
    params: Params,
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
    check_needs(recipe, "train_online", online.reference, heads)
    recipe = with_heads(recipe, heads, read_entropies(reward_heads) if reward_heads else {})
    tokenizer = load_tokenizer(model)
    rows = training_prompts(prompts, None)
    known = {row["prompt_id"]: row for row in rows}
    places = {row["prompt_id"]: index for index, row in enumerate(rows)}
    per_round = online.updates_per_round
    updates = online.steps * per_round
    processes = connect(online.device)
    policy = Policy(model, online.dtype, online.device, online.optimizer, updates)
    order = PromptOrder(len(rows), online.prompts_per_step, online.seed)
    checkpoints = Checkpoints(
        resume, online.checkpoint, policy.optimizer, per_round, processes.main
    )
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
        policy.model,
        temperature,
        online.token_budget,
        params.annotate.token_budget,
        online.share_prompts,
    )
    # what scoring keeps is of one draw's rows, in one process: useful where those are the round
    whole_graph = online.dynamic_sampling is None and processes.count == 1

    def draw(
        number: int, before: Round | None, engine: Engine, grader: Grader, cluster: Clusterer
    ) -> Round:
        seed = round_seed(online.seed, number)
        carried = by_group(before.surplus) if before else []
        used = {places[group[0]["prompt_id"]] for group in carried}
        seen: Group = []
        entropies: list[float] = []

        def sample(count: int) -> list[Group]:
            chosen = [rows[index] for index in order.take(count, used)]
            annotated: Group = []
            groups: Group = []
            if mine := processes.share(chosen):
                requests = group_requests(mine, tokenizer, params.rollout.group_size)
                completions = engine.generate(requests, sampling, seed)
                sampled = rollout_rows(requests, completions, seed, engine)
                annotated, groups = annotate_rows(
                    sampled, known, scoring, grader, cluster, params.annotate
                )
            processes.check_equal(engine.policy_version, "the policy")
            annotated = processes.gather_groups(annotated)
            groups = processes.gather(groups)
            check_columns(recipe, annotated, f"step {number + 1}")
            seen.extend(annotated)
            entropies.extend(group["semantic_entropy_rao"] for group in groups)
            return by_group(annotated)

        dynamic, wanted = online.dynamic_sampling, online.prompts_per_step
        if dynamic is None:
            filled = Filled(sample(wanted), [], 1.0, {})
        else:
            share = before.share if before else 1.0
            signal = partial(has_signal, recipe, device=policy.model.device)
            filled = fill(wanted, carried, share, sample, signal, dynamic)
        batch = [row for group in filled.groups for row in group]
        measured = {
            "reward_mean": float(np.mean([row["reward"] for row in seen or batch])),
            "semantic_entropy": float(np.mean(entropies)) if entropies else 0.0,
            **filled.measured,
        }
        surplus = [row for group in filled.surplus for row in group]
        count = sum(map(len, carried))
        return Round(batch, measured, order.position(), count, surplus, filled.share)

    with (
        progress(online.steps, "steps", "train_online", policy.optimizer.done // per_round) as bar,
        Grader(params.annotate.grader) as grader,
        closing(open_engine(params.rollout, model, policy.model)) as engine,
    ):
        cluster = clusterer(params.annotate.clusters, grader, params.annotate.device)
        if policy.optimizer.done:  # it may have started with the weights in `model`
            engine.update_weights(policy.model)
        drawn: Round | None = None
        for update in range(policy.optimizer.done, updates):
            number, part = divmod(update, per_round)
            if drawn is None or part == 0:
                before = drawn
                if before is None and online.dynamic_sampling and number and part == 0:
                    before = kept.read(number - 1, None)
                drawn = kept.read(number, engine.policy_version if part == 0 else None)
                if drawn:
                    order.restore(drawn.order)
                    # the graph is no file: the same forward gives it again
                    if part == 0 and whole_graph:
                        scoring(drawn.rows)
                else:
                    fresh = draw(number, before, engine, grader, cluster)
                    if processes.main:
                        kept.write(number, fresh)
                    processes.wait()
                    drawn = kept.read(number, None)
                assert drawn
            if reference:
                reference.add_logprobs(drawn.rows)
            with bad_batch_kept(drawn.rows, resume):
                batch = examples(drawn.rows, policy.model.device)
                gap = measure(batch.batch) if sampling.temperature else {}
                gated = gate(gap, online.gap, recipe, f"step {number + 1}")
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
                measured |= {**gap, "gap_corrected": float(gated is not recipe)} if gap else {}
            if part + 1 == per_round:
                engine.update_weights(policy.model)
                state.curve.append({"step": number + 1, **drawn.measured, **measured})
                reward = drawn.measured["reward_mean"]
                bar.advance(1, f"reward {reward:.3f}, loss {measured['loss']:.4f}")
            state.data = {"order": order.position(), "policy_version": engine.policy_version}
            checkpoints.save_if_due(state)
    if processes.main:
        policy.save(tokenizer, out, checkpoints.best_weights(state.curve))
        kept.assemble(online.steps, rounds)
        io.write_csv(curve, state.curve)
    processes.close()
    first, last = (np.mean([r["reward_mean"] for r in part]) for part in _ends(state.curve))
    return f"{online.steps} steps of {recipe.name}, mean reward {first:.3f} -> {last:.3f}"


def _ends(rows: list[dict[str, float]]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    count = max(1, len(rows) // 10)
    return rows[:count], rows[-count:]
