"""Stage rollout: groups of completions for training prompts, in shards that are whole or absent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from entrograd.data.prompt import encode
from entrograd.errors import InputError, Unfinished
from entrograd.models.load import load_tokenizer
from entrograd.pipeline.progress import Progress, progress
from entrograd.pipeline.shards import chosen_shards, map_shards
from entrograd.rollout.engine import Completion, Engine, Request, check_requests
from entrograd.rollout.engines import known_context, open_engine
from entrograd.rollout.params import RolloutParams
from entrograd.storage.tables import assemble, read_table, shard_name, write_table


def rollout(
    params: RolloutParams,
    model: Path,
    prompts: Path,
    out: Path,
    resume: Path,
    part: str | None = None,
) -> str:
    """Sample `group_size` completions of each training prompt into shards under `out`.

    Shards finished in `resume` by an interrupted run, or by runs of other parts, are kept. `part`
    names the shards to compute (`3-5`); `out` appears once all are there, until then Unfinished is
    raised. Returns the one-line result. InputError where the table has no training prompt or a
    prompt does not fit the context.
    """
    rows = encoded_prompts(prompts, params.prompts, params, model)
    resume = resume / f"by-{params.shard_prompts}"  # shards of another size are another division
    shards = [
        rows[start : start + params.shard_prompts]
        for start in range(0, len(rows), params.shard_prompts)
    ]

    def absent() -> list[int]:
        return [i for i in range(len(shards)) if not (resume / shard_name(i)).exists()]

    chosen = set(chosen_shards(part, len(shards)))
    missing = [index for index in absent() if index in chosen]
    total = sum(len(shards[i]) for i in missing) * params.group_size
    with progress(total, "completions", "rollout") as bar:
        inline = params.executor.kind == "inline"
        arguments = (params, model, shards, bar if inline else None)
        for index, table in map_shards(params.executor, shard_worker, arguments, missing):
            write_table(
                resume / shard_name(index),
                table,
                "rollouts",
                sampling=params.sampling.model_dump(),
                engine=params.engine,
            )
            if not inline:
                bar.advance(len(table))
    if left := absent():
        raise Unfinished(f"{len(missing)} shards computed, {len(left)} of {len(shards)} left")
    assemble(resume, out, [shard_name(i) for i in range(len(shards))])
    kept = f", {len(shards) - len(missing)} shards kept" if len(missing) < len(shards) else ""
    count = len(rows) * params.group_size
    return f"{count} completions of {len(rows)} prompts in {len(shards)} shards{kept}"


@contextmanager
def shard_worker(
    params: RolloutParams,
    model: Path,
    shards: Sequence[Sequence[Mapping[str, Any]]],
    bar: Progress | None,
) -> Iterator[Callable[[int], list[dict[str, Any]]]]:
    """The function from a shard's number to its rows; its engine lives as long as the context."""
    with closing(open_engine(params, model)) as engine:

        def work(index: int) -> list[dict[str, Any]]:
            requests = group_requests(shards[index], params.group_size)
            completions = engine.generate(requests, params.sampling, params.seed, bar)
            return rollout_rows(requests, completions, params.seed, engine)

        yield work


def training_prompts(prompts: Path, limit: int | None) -> list[dict[str, Any]]:
    """The first `limit` training rows of the prompts table; InputError where there is none."""
    rows = [r for r in read_table(prompts, "prompts").to_pylist() if r["split"] == "train"]
    if not rows:
        raise InputError(f"{prompts}: no row of split 'train'; lower prepare.heldout_fraction")
    if limit is not None and limit > len(rows):
        raise InputError(
            f"{prompts}: {len(rows)} training prompts, {limit} asked for; lower rollout.prompts "
            "or add data"
        )
    return rows[:limit]


def encoded_prompts(
    prompts: Path, limit: int | None, params: RolloutParams, model: Path
) -> list[dict[str, Any]]:
    """The rows of `training_prompts`, each with its `prompt_ids`.

    No weights are loaded yet: a run ends at its start on a prompt that it would come to late.
    Raises InputError naming file and prompt where one can't be encoded, or with its new tokens
    exceeds the context (`engines.known_context`).
    """
    tokenizer = load_tokenizer(model)
    rows = training_prompts(prompts, limit)
    try:
        for row in rows:
            row["prompt_ids"] = tuple(encode(row, tokenizer))
        check_requests(group_requests(rows, 1), params.sampling, known_context(params, model))
    except InputError as error:
        raise InputError(f"{prompts}: {error}") from None
    return rows


def group_requests(prompts: Sequence[Mapping[str, Any]], group_size: int) -> list[Request]:
    """`group_size` requests a row of `encoded_prompts`, group after group."""
    return [
        Request(prompt["prompt_id"], sample, prompt["prompt_ids"])
        for prompt in prompts
        for sample in range(group_size)
    ]


def rollout_rows(
    requests: Sequence[Request], completions: Sequence[Completion], seed: int, engine: Engine
) -> list[dict[str, Any]]:
    """Rows of the rollouts schema."""
    return [
        {
            "prompt_id": request.prompt_id,
            "sample_index": request.sample_index,
            "prompt_ids": list(request.prompt_ids),
            "completion_ids": list(completion.completion_ids),
            "completion_text": completion.text,
            "sampling_logprobs": list(completion.sampling_logprobs),
            "finish_reason": completion.finish_reason,
            "seed": seed,
            "policy_version": engine.policy_version,
        }
        for request, completion in zip(requests, completions, strict=True)
    ]
