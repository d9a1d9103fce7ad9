"""Stage rollout: groups of completions for training prompts, in shards that are whole or absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from entrograd import io
from entrograd.data.prompt import encode
from entrograd.errors import InputError
from entrograd.models.load import load_tokenizer
from entrograd.params import RolloutParams
from entrograd.progress import progress
from entrograd.rollout.engine import Completion, Engine, Request
from entrograd.rollout.engines import open_engine


def rollout(params: RolloutParams, model: Path, prompts: Path, out: Path, resume: Path) -> str:
    """Sample `group_size` completions of each training prompt into shards under `out`.

    Shards finished in `resume` by an interrupted run are kept. Returns the one-line result.
    InputError where the table has no training prompt or a prompt does not fit the context.
    """
    rows = training_prompts(prompts, params.prompts)
    shards = [
        rows[start : start + params.shard_prompts]
        for start in range(0, len(rows), params.shard_prompts)
    ]
    missing = [i for i in range(len(shards)) if not (resume / io.shard_name(i)).exists()]
    if missing:
        tokenizer = load_tokenizer(model)
        total = sum(len(shards[i]) for i in missing) * params.group_size
        with (
            closing(open_engine(params, model)) as engine,
            progress(total, "completions", "rollout") as bar,
        ):
            for index in missing:
                requests = group_requests(shards[index], tokenizer, params.group_size)
                completions = engine.generate(requests, params.sampling, params.seed, bar)
                table = rollout_rows(requests, completions, params.seed, engine)
                io.write_table(
                    resume / io.shard_name(index),
                    table,
                    "rollouts",
                    sampling=params.sampling.model_dump(),
                    engine=params.engine,
                )
    io.assemble(resume, out, [io.shard_name(i) for i in range(len(shards))])
    kept = f", {len(shards) - len(missing)} shards kept" if len(missing) < len(shards) else ""
    count = len(rows) * params.group_size
    return f"{count} completions of {len(rows)} prompts in {len(shards)} shards{kept}"


def training_prompts(prompts: Path, limit: int | None) -> list[dict[str, Any]]:
    """The first `limit` training rows of the prompts table; InputError where there is none."""
    rows = [r for r in io.read_table(prompts, "prompts").to_pylist() if r["split"] == "train"]
    if not rows:
        raise InputError(f"{prompts}: no row of split 'train'; lower prepare.heldout_share")
    if limit is not None and limit > len(rows):
        raise InputError(
            f"{prompts}: {len(rows)} training prompts, {limit} asked for; lower rollout.prompts "
            "or add data"
        )
    return rows[:limit]


def group_requests(
    prompts: Sequence[Mapping[str, Any]], tokenizer: Any, group_size: int
) -> list[Request]:
    """`group_size` requests a prompt, group after group."""
    return [
        Request(prompt["prompt_id"], sample, ids)
        for prompt in prompts
        for ids in [tuple(encode(prompt, tokenizer))]
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
