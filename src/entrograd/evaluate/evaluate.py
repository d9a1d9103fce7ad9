"""Accuracy of models on the held-out split and on benchmarks, every graded completion kept."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from entrograd.data.prompt import encode
from entrograd.errors import InputError
from entrograd.evaluate.benchmarks import HELDOUT, Task, benchmark_task, grader_version, heldout
from entrograd.evaluate.estimators import (
    Interval,
    all_alike,
    average_at_n,
    paired_difference,
    problem_means,
    wilson,
)
from entrograd.evaluate.params import EvaluateParams
from entrograd.models.load import load_model, load_tokenizer
from entrograd.pipeline.progress import Progress, progress
from entrograd.rewards.verify.grade import Grader, Item
from entrograd.rollout.engine import Request
from entrograd.rollout.transformers_engine import TransformersEngine
from entrograd.storage.files import write_json
from entrograd.storage.hashing import text_hash
from entrograd.storage.tables import assemble, provenance, read_table, shard_name, write_table

if TYPE_CHECKING:
    from entrograd.data.prompt import Tokenizer

log = logging.getLogger("entrograd")


def evaluate(
    section: EvaluateParams,
    models: Mapping[str, Path],
    prompts: Path | None,
    samples: Path,
    summary: Path,
    benchmarks: Path,
    resume: Path,
) -> str:
    """Sample, grade and score every model on every task; returns the one-line result.

    Args:
        models: name -> folder. The first is what the others' differences are taken from.
        prompts: the prompts table whose held-out rows are evaluated; None for benchmarks alone.
        samples: folder of samples shards to write, one per model and task.
        summary: JSON to write: the held-out scores by model, `X_minus_FIRST` the differences.
        benchmarks: JSON to write: the same a benchmark, with its list's hash and the grader's.
        resume: finished shards are kept here; a restarted run samples only what is missing.

    Raises InputError where there is nothing to evaluate, a list of problems is not the pinned one
    or a prompt does not fit into a model's context.
    """
    tasks = [] if prompts is None else [heldout(prompts, section)]
    tasks += [benchmark_task(benchmark) for benchmark in section.benchmarks]
    if not tasks:
        raise InputError("nothing to evaluate: give --prompts, or name evaluate.benchmarks")
    shards = {
        (model, task.name): resume / shard_name(index)
        for index, (model, task) in enumerate((m, t) for m in models for t in tasks)
    }
    _sample(section, models, tasks, shards)
    rewards = {key: _rewards(shard, key) for key, shard in shards.items()}
    names = list(models)
    held = tasks[0] if prompts is not None else None
    assemble(resume, samples, [shard.name for shard in shards.values()])
    write_json(summary, _summary(section, names, held, rewards))
    named = tasks if held is None else tasks[1:]
    write_json(
        benchmarks, {task.name: _benchmark(section, names, task, shards, rewards) for task in named}
    )
    first = held or tasks[0]
    scores = (
        f"{name} {100 * score(section, first, rewards[name, first.name]).value:.1f} %"
        for name in names
    )
    problems = len(first.problems)
    more = f", and {len(tasks) - 1} more" if len(tasks) > 1 else ""
    return f"{first.name}, {problems} problems: {', '.join(scores)}{more}"


def score(section: EvaluateParams, task: Task, rewards: Sequence[Sequence[float]]) -> Interval:
    """A model's accuracy on a task: Wilson for greedy completions, else avg@n."""
    if task.sampling.temperature == 0:
        correct = sum(samples[0] >= 1 for samples in rewards)
        return wilson(correct, len(rewards), section.confidence)
    return average_at_n(rewards, section.bootstrap, section.confidence, section.seed)


# --- sampling and grading --------------------------------------------------------------------


def _sample(
    section: EvaluateParams,
    models: Mapping[str, Path],
    tasks: Sequence[Task],
    shards: Mapping[tuple[str, str], Path],
) -> None:
    """Write the shards that are missing, one model in memory at a time."""
    done = sum(t.completions for m in models for t in tasks if _finished(shards[m, t.name], t))
    total = len(models) * sum(task.completions for task in tasks)
    if done:
        log.info("%d of %d completions are there already", done, total)
    with progress(total - done, "completions", "evaluate") as bar, Grader(section.grader) as grader:
        for name, path in models.items():
            missing = [task for task in tasks if not _finished(shards[name, task.name], task)]
            if not missing:
                continue
            model = load_model(path, section.dtype, section.device)
            tokenizer = load_tokenizer(path)
            engine = TransformersEngine(model, tokenizer, section.token_budget)
            for task in missing:
                rows = _graded(section, name, task, engine, tokenizer, grader, bar)
                write_table(
                    shards[name, task.name],
                    rows,
                    "samples",
                    model=name,
                    policy_version=engine.policy_version,
                    chat_template_sha256=_template_hash(tokenizer),
                    sampling=task.sampling.model_dump(),
                    seed=section.seed,
                    list_sha256=task.list_sha256,
                    grader=grader_version(),
                )
            del engine, model
            gc.collect()


def _finished(shard: Path, task: Task) -> bool:
    """Whether the shard is there, and of these very problems: a benchmark's file is named in
    params, so the resume folder's key does not know its content."""
    return shard.exists() and provenance(shard).get("list_sha256") == task.list_sha256


def _graded(
    section: EvaluateParams,
    model: str,
    task: Task,
    engine: TransformersEngine,
    tokenizer: Tokenizer,
    grader: Grader,
    bar: Progress,
) -> list[dict[str, object]]:
    """Rows of the samples schema, problems in the list's order."""
    pairs = [(problem, index) for problem in task.problems for index in range(task.n)]
    encoded = {
        problem.problem_id: tuple(encode(problem.prompt, tokenizer)) for problem in task.problems
    }
    requests = [Request(p.problem_id, index, encoded[p.problem_id]) for p, index in pairs]
    completions = engine.generate(requests, task.sampling, section.seed, bar)
    grades = grader.grade(
        [
            Item(problem.answers, completion.text, completion.finish_reason)
            for (problem, _), completion in zip(pairs, completions, strict=True)
        ]
    )
    statuses = Counter(grade.status for grade in grades)
    log.info(
        "%s on %s: mean reward %.3f (%s)",
        model,
        task.name,
        sum(grade.reward for grade in grades) / len(grades),
        ", ".join(f"{status} {count}" for status, count in sorted(statuses.items())),
    )
    return [
        {
            "model": model,
            "benchmark": task.name,
            "problem_id": problem.problem_id,
            "sample_index": index,
            "problem": problem.problem,
            "answers": list(problem.answers),
            "completion_text": completion.text,
            "answer": grade.answer,
            "extraction_rule": grade.rule,
            "reward": grade.reward,
            "reward_status": grade.status,
            "finish_reason": completion.finish_reason,
        }
        for (problem, index), completion, grade in zip(pairs, completions, grades, strict=True)
    ]


def _template_hash(tokenizer: Tokenizer) -> str | None:
    """Of what turns messages into a prompt: it lies beside the weights, not in them."""
    template = getattr(tokenizer, "chat_template", None)
    return text_hash(template) if isinstance(template, str) else None


def _rewards(shard: Path, key: tuple[str, str]) -> list[list[float]]:
    """The rewards of each problem's samples, problems in the list's order."""
    table = read_table(shard, "samples").select(["model", "benchmark", "problem_id", "reward"])
    found: dict[str, list[float]] = {}
    for row in table.to_pylist():
        assert (row["model"], row["benchmark"]) == key
        found.setdefault(row["problem_id"], []).append(row["reward"])
    return list(found.values())


# --- scores ----------------------------------------------------------------------------------


def _summary(
    section: EvaluateParams,
    names: Sequence[str],
    held: Task | None,
    rewards: Mapping[tuple[str, str], Sequence[Sequence[float]]],
) -> dict[str, object]:
    if held is None:
        return {}
    models = {name: score(section, held, rewards[name, HELDOUT]) for name in names}
    return {
        **{name: {"n": len(held.problems), **_accuracy(found)} for name, found in models.items()},
        **_differences(section, names, HELDOUT, rewards),
    }


def _benchmark(
    section: EvaluateParams,
    names: Sequence[str],
    task: Task,
    shards: Mapping[tuple[str, str], Path],
    rewards: Mapping[tuple[str, str], Sequence[Sequence[float]]],
) -> dict[str, object]:
    """A benchmark's entry: every model's score, and all it takes to get it again: what was asked
    of which weights, and how it was sampled and graded."""
    models = {}
    for name in names:
        shard = shards[name, task.name]
        statuses = read_table(shard, "samples").column("reward_status")
        origin = provenance(shard)
        models[name] = {
            **_accuracy(score(section, task, rewards[name, task.name])),
            "reward_status": dict(Counter(statuses.to_pylist())),
            "policy_version": origin["policy_version"],
            "chat_template_sha256": origin["chat_template_sha256"],
        }
    return {
        "problems": len(task.problems),
        "list_sha256": task.list_sha256,
        "prompt": task.prompt and task.prompt.model_dump(),
        "n": task.n,
        **task.sampling.model_dump(),
        "seed": section.seed,
        "dtype": section.dtype,
        "grader": grader_version(),
        "extraction": section.grader.extraction,
        "bootstrap": section.bootstrap,
        "confidence": section.confidence,
        "models": models,
        "differences": _differences(section, names, task.name, rewards),
    }


def _accuracy(interval: Interval) -> dict[str, float]:
    return {"accuracy": interval.value, "ci_low": interval.low, "ci_high": interval.high}


def _differences(
    section: EvaluateParams,
    names: Sequence[str],
    task: str,
    rewards: Mapping[tuple[str, str], Sequence[Sequence[float]]],
) -> dict[str, dict[str, float]]:
    """`X_minus_FIRST` for every model but the first."""
    first, found = names[0], {}
    before = problem_means(rewards[first, task])
    for name in names[1:]:
        after = problem_means(rewards[name, task])
        if all_alike(before, after):
            log.warning(
                "%s - %s on %s: all %d differences are equal, so the bootstrap interval of their "
                "mean has no width and says nothing; evaluate more or harder problems",
                *(name, first, task, len(before)),
            )
        interval = paired_difference(
            before, after, section.bootstrap, section.confidence, section.seed
        )
        found[f"{name}_minus_{first}"] = {
            "diff": interval.value,
            "ci_low": interval.low,
            "ci_high": interval.high,
        }
    return found
