"""Stage train_online: rollout, grade, annotate, update, round after round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from entrograd import io
from entrograd.annotate.annotate import annotate_rows
from entrograd.methods import recipe as choose
from entrograd.models.forward import score
from entrograd.models.load import load_tokenizer
from entrograd.params import Params
from entrograd.progress import progress
from entrograd.rollout.engines import open_engine
from entrograd.rollout.rollout import group_requests, rollout_rows, training_prompts
from entrograd.train.batch import examples
from entrograd.train.setup import Policy, check_columns
from entrograd.train.step import StepSettings, train_step
from entrograd.verify.grade import Grader


def train_online(
    params: Params, model: Path, prompts: Path, out: Path, rounds: Path, curve: Path, resume: Path
) -> str:
    """Train the model in `model` on completions it draws itself; write weights, every round's
    annotated rollouts (a shard a round) and the learning curve. Returns the one-line result."""
    online, recipe = params.train_online, choose(params.method)
    tokenizer = load_tokenizer(model)
    rows = training_prompts(prompts, None)
    answers = {row["prompt_id"]: row["answers"] for row in rows}
    updates = online.steps * online.updates_per_round
    policy = Policy(model, online.dtype, online.device, online.optimizer, updates)
    sampling = params.rollout.sampling
    temperature = sampling.temperature or 1.0
    settings = StepSettings(temperature, sampling.max_new_tokens, online.token_budget)

    def scores(chunk: Sequence[Mapping[str, Any]]) -> list[tuple[list[float], list[float]]]:
        return score(
            policy.model,
            [row["prompt_ids"] for row in chunk],
            [row["completion_ids"] for row in chunk],
            temperature,
            params.annotate.token_budget,
        )

    curve_rows: list[dict[str, float]] = []
    draws = prompt_order(len(rows), online.prompts_per_step, online.seed)
    with (
        progress(online.steps, "steps", "train_online") as bar,
        Grader(params.annotate.grader) as grader,
        closing(open_engine(params.rollout, model, policy.model)) as engine,
    ):
        for step in range(online.steps):
            seed = round_seed(online.seed, step)
            chosen = [rows[index] for index in next(draws)]
            requests = group_requests(chosen, tokenizer, params.rollout.group_size)
            completions = engine.generate(requests, sampling, seed)
            sampled = rollout_rows(requests, completions, seed, engine)
            annotated, groups = annotate_rows(sampled, answers, scores, grader, params.annotate)
            check_columns(recipe, annotated, f"step {step + 1}")
            io.write_table(
                resume / io.shard_name(step),
                annotated,
                "annotated",
                sampling=sampling.model_dump(),
                engine=params.rollout.engine,
            )
            batch = examples(annotated, policy.model.device)
            for _ in range(online.updates_per_round):
                measured = train_step(policy.model, policy.optimizer, recipe, batch, settings)
            engine.update_weights(policy.model)
            reward = float(np.mean([row["reward"] for row in annotated]))
            entropy = float(np.mean([group["semantic_entropy_rao"] for group in groups]))
            curve_rows.append(
                {"step": step + 1, "reward_mean": reward, "semantic_entropy": entropy, **measured}
            )
            bar.advance(1, f"reward {reward:.3f}, loss {measured['loss']:.4f}")
    policy.save(tokenizer, out)
    io.assemble(resume, rounds, [io.shard_name(step) for step in range(online.steps)])
    io.write_csv(curve, curve_rows)
    first, last = (np.mean([r["reward_mean"] for r in part]) for part in _ends(curve_rows))
    return f"{online.steps} steps of {recipe.name}, mean reward {first:.3f} -> {last:.3f}"


def prompt_order(prompts: int, per_step: int, seed: int) -> Iterator[list[int]]:
    """Indexes of each step's prompts: permutation after permutation, each prompt once in each,
    never the same prompt twice in a step."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    waiting: list[int] = []
    while True:
        chosen: list[int] = []
        while len(chosen) < min(per_step, prompts):
            if not waiting:
                waiting = generator.permutation(prompts).tolist()
            following = next(i for i in waiting if i not in chosen)
            waiting.remove(following)
            chosen.append(following)
        yield chosen


def round_seed(seed: int, step: int) -> int:
    """A seed a round, below 2**63, a function of the run's seed and the round alone."""
    return int(io.text_hash("round", str(seed), str(step))[:15], 16)


def _ends(rows: list[dict[str, float]]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    count = max(1, len(rows) // 10)
    return rows[:count], rows[-count:]
