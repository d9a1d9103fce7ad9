"""Stage rollout: groups of completions for training prompts, in shards that are whole or absent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from entrograd.data.groups import Completion, PromptGroup, arrays_of, list_array, table_of
from entrograd.data.prompt import encode
from entrograd.errors import InputError, Unfinished
from entrograd.models.load import load_tokenizer
from entrograd.pipeline.progress import Progress, progress
from entrograd.pipeline.shards import chosen_shards, map_shards
from entrograd.rollout.engine import Engine, Request, Sampled, check_requests
from entrograd.rollout.engines import known_context, open_engine
from entrograd.rollout.params import RolloutParams
from entrograd.storage.files import atomic
from entrograd.storage.hashing import sha256, text_hash
from entrograd.storage.schemas import SCHEMAS
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
    rows = encoded_prompts(prompts, params.prompts, params, model, resume)
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
    shards: Sequence[Sequence[EncodedPrompt]],
    bar: Progress | None,
) -> Iterator[Callable[[int], pa.Table]]:
    """The function from a shard's number to its table; its engine lives as long as the context."""
    with closing(open_engine(params, model)) as engine:

        def work(index: int) -> pa.Table:
            requests = group_requests(shards[index], params.group_size)
            completions = engine.generate(requests, params.sampling, params.seed, bar)
            groups = rollout_groups(requests, completions, params.seed, engine)
            return table_of(groups, "rollouts")

        yield work


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt and its tokens [P] int32."""

    prompt_id: str
    prompt_ids: np.ndarray


def training_prompts(prompts: Path, limit: int | None) -> pa.Table:
    """The first `limit` training rows of the prompts table; InputError if there is none."""
    table = read_table(prompts, "prompts").filter(pc.field("split") == "train")
    if not len(table):
        raise InputError(f"{prompts}: no row of split 'train'; lower prepare.heldout_fraction")
    if limit is not None and limit > len(table):
        raise InputError(
            f"{prompts}: {len(table)} training prompts, {limit} asked for; lower rollout.prompts "
            "or add data"
        )
    return table[:limit]


def encoded_prompts(
    prompts: Path, limit: int | None, params: RolloutParams, model: Path, resume: Path
) -> list[EncodedPrompt]:
    """The training prompts, tokenised; their tokens are stored in `resume`, for another start.

    No weights are loaded yet: a run ends at its start on a prompt that it would come to late.
    Raises InputError naming file and prompt if one can't be encoded, or with its new tokens
    exceeds the context (`engines.known_context`).
    """
    try:
        table = _encoded(prompts, limit, model, resume)
        rows = [
            EncodedPrompt(*row)
            for row in zip(table["prompt_id"].to_pylist(), _arrays(table), strict=True)
        ]
        context = known_context(params, model)
        for row in rows:
            check_requests(group_requests([row], 1), params.sampling, context)
    except InputError as error:
        message = str(error).removeprefix(f"{prompts}: ")
        raise InputError(f"{prompts}: {message}") from None
    return rows


def _encoded(prompts: Path, limit: int | None, model: Path, resume: Path) -> pa.Table:
    """prompt_id and prompt_ids of the training prompts: a file of `resume`, named by what they are
    a function of, or tokenised now."""
    small = (file for file in sorted(model.iterdir()) if file.suffix != ".safetensors")
    hashes = [sha256(path) for path in (prompts, *filter(Path.is_file, small))]
    stored = resume / f"prompts-{text_hash(str(limit), *hashes)[:16]}.parquet"
    if stored.exists():
        return pq.read_table(stored)
    table, tokenizer = training_prompts(prompts, limit), load_tokenizer(model)
    ids = [
        np.array(encode(row, tokenizer), np.int32)
        for batch in table.to_batches(max_chunksize=1024)
        for row in batch.to_pylist()
    ]
    kind = SCHEMAS["rollouts"].field("prompt_ids").type
    encoded = pa.table({"prompt_id": table["prompt_id"], "prompt_ids": list_array(ids, kind)})
    with atomic(stored) as temporary:
        pq.write_table(encoded, temporary, compression="zstd")
    return encoded


def _arrays(table: pa.Table) -> list[np.ndarray]:
    return [ids for ids in arrays_of(table["prompt_ids"]) if ids is not None]


def group_requests(prompts: Sequence[EncodedPrompt], group_size: int) -> list[Request]:
    """`group_size` requests per prompt, group after group."""
    return [
        Request(prompt.prompt_id, sample, ids)
        for prompt in prompts
        for ids in [tuple(prompt.prompt_ids.tolist())]
        for sample in range(group_size)
    ]


def rollout_groups(
    requests: Sequence[Request], completions: Sequence[Sampled], seed: int, engine: Engine
) -> list[PromptGroup]:
    """The groups of what the engine sampled for `requests`, prompts in order of first appearance.
    `seed` is the draw's."""
    groups: dict[str, PromptGroup] = {}
    for request, sampled in zip(requests, completions, strict=True):
        if request.prompt_id not in groups:
            prompt_ids = np.array(request.prompt_ids, np.int32)
            groups[request.prompt_id] = PromptGroup(request.prompt_id, prompt_ids, [])
        groups[request.prompt_id].completions.append(
            Completion(
                sample_index=request.sample_index,
                completion_ids=np.array(sampled.completion_ids, np.int32),
                completion_text=sampled.text,
                finish_reason=sampled.finish_reason,
                seed=seed,
                policy_version=engine.policy_version,
                tokens={"sampling_logprobs": np.array(sampled.sampling_logprobs, np.float32)},
            )
        )
    return list(groups.values())
