"""Completions of models on the held-out split and on benchmarks, sampled and graded."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from entrograd.data.prompt import encode
from entrograd.errors import InputError
from entrograd.evaluate.benchmarks import Task, benchmark_task, grader_version, heldout
from entrograd.evaluate.params import EvaluateParams
from entrograd.models.load import load_model, load_tokenizer
from entrograd.pipeline.progress import Progress, progress
from entrograd.rewards.verify.grade import Grader, Item
from entrograd.rollout.engine import Request
from entrograd.rollout.transformers_engine import TransformersEngine
from entrograd.storage.hashing import text_hash
from entrograd.storage.tables import assemble, provenance, shard_name, write_table

if TYPE_CHECKING:
    from entrograd.data.prompt import Tokenizer

log = logging.getLogger("entrograd")


def evaluate(
    section: EvaluateParams,
    models: Mapping[str, Path],
    prompts: Path | None,
    samples: Path,
    resume: Path,
) -> str:
    """Sample and grade every model on every task; returns the one-line result.

    Args:
        models: name -> folder. The first is the one that stage score compares the others with.
        prompts: the prompts table whose held-out rows are evaluated; None for benchmarks alone.
        samples: folder of samples shards to write, one per model and task, in that order; the
            metadata of each says all of its task that stage score needs.
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
    assemble(resume, samples, [shard.name for shard in shards.values()])
    asked = ", ".join(f"{task.name} ({len(task.problems)} problems)" for task in tasks)
    completions = len(models) * sum(task.completions for task in tasks)
    return f"{completions} completions sampled and graded: {', '.join(models)} on {asked}"


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
                    benchmark=task.name,
                    list_sha256=task.list_sha256,
                    problems=len(task.problems),
                    prompt=task.prompt and task.prompt.model_dump(),
                    n=task.n,
                    sampling=task.sampling.model_dump(),
                    seed=section.seed,
                    dtype=section.dtype,
                    grader=grader_version(),
                    extraction=section.grader.extraction,
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
