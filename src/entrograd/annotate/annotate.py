"""Stage annotate: reward, token entropies, clusters and semantic entropy of stored rollouts.

A shard of rollouts becomes a shard of annotated rows, whole or not at all; finished ones are kept
when the stage is run again after an interruption.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from entrograd.annotate.clusters import clusterer
from entrograd.annotate.completions import (
    Piece,
    PieceReader,
    Prompts,
    complete,
    lacks_tokens,
    plan,
)
from entrograd.annotate.groups import annotate_groups
from entrograd.annotate.params import AnnotateParams
from entrograd.annotate.reward_weights import summarise_heads
from entrograd.annotate.summary import check_alarms, summarise
from entrograd.annotate.token_entropy import scorer
from entrograd.data.groups import groups_of, table_of
from entrograd.errors import InputError, Unfinished
from entrograd.pipeline.progress import progress
from entrograd.pipeline.shards import chosen_shards, map_shards
from entrograd.rewards import heads
from entrograd.rewards.verify.grade import Grader
from entrograd.storage.files import write_json
from entrograd.storage.schemas import SCHEMAS
from entrograd.storage.tables import (
    Provenance,
    assemble,
    provenance,
    read_table,
    shard_files,
    shard_name,
    write_table,
)

log = logging.getLogger("entrograd")


def annotate(
    params: AnnotateParams,
    prompts: Path,
    rollouts: Path,
    model: Path,
    out: Path,
    groups: Path,
    summary: Path,
    reward_heads: Path,
    resume: Path,
    part: str | None = None,
) -> str:
    """Annotate a table of rollouts (a folder of shards, or one file) with the model in `model`.

    Columns but prompt_id and completion_text may be absent: `complete` fills them in. Writes shards
    to `out`, the groups table, the summary and what is known of the reward heads. Shards finished
    in `resume` by an interrupted run, or by runs of other parts, are kept. `part` names the shards
    to compute (`3-5`); until all are there Unfinished is raised. Returns the one-line result.
    InputError where a prompt is unknown, a row does not fit the model, or an alarm stops the stage.
    """
    heads.load(params.heads)  # a mistake there shows before the model is loaded
    files = shard_files(rollouts) if rollouts.is_dir() else [rollouts]
    pieces = plan(files, Prompts(prompts))
    origin = provenance(files[0])
    names = [shard_name(index) for index in range(len(pieces))]
    done, done_groups = resume / "annotated", resume / "groups"

    def absent() -> list[int]:
        return [index for index, shard in enumerate(names) if not (done / shard).exists()]

    left, chosen = absent(), set(chosen_shards(part, len(names)))
    if len(left) < len(names):
        log.info("%d of %d shards were finished before", len(names) - len(left), len(names))
    missing = [index for index in left if index in chosen]
    arguments = (params, pieces, prompts, model, _temperature(origin, rollouts))
    samplers: dict[str, set[str]] = {}
    with progress(sum(pieces[i].rows for i in missing), "completions", "annotate") as bar:
        for index, shard in map_shards(params.executor, shard_worker, arguments, missing):
            with_what = {"grader": f"math-verify {version('math-verify')}", "model": shard.policy}
            noted = {**origin, "annotate": with_what}
            # The groups first: a shard of annotated rows says that both are there.
            write_table(done_groups / names[index], shard.groups, "groups", **noted)
            write_table(done / names[index], shard.rows, "annotated", **noted)
            samplers.setdefault(shard.policy, set()).update(shard.samplers)
            bar.advance(pieces[index].rows)
    _note_other_policies(samplers, rollouts)
    if left := absent():
        raise Unfinished(f"{len(missing)} shards computed, {len(left)} of {len(names)} left")
    values = summarise([done / shard for shard in names], [done_groups / shard for shard in names])
    check_alarms(values, params.alarms)
    table = pa.concat_tables(read_table(done_groups / shard, "groups") for shard in names)
    assemble(done, out, names)
    write_table(groups, table, "groups", **provenance(done / names[0]))
    write_json(summary, values)
    write_json(reward_heads, summarise_heads(map(_rated, (out / s for s in names))))
    return (
        f"{values['completions']} completions of {values['groups']} prompts, "
        f"mean reward {values['mean_reward']:.3f}, "
        f"groups with signal {values['groups_with_signal']:.0%}"
    )


@dataclass(frozen=True)
class Shard:
    """A piece annotated: both tables, the version of the model that did it and those of others
    that sampled."""

    rows: pa.Table
    groups: pa.Table
    policy: str
    samplers: frozenset[str]


@contextmanager
def shard_worker(
    params: AnnotateParams, pieces: Sequence[Piece], prompts: Path, model: Path, temperature: float
) -> Iterator[Callable[[int], Shard]]:
    """The function from a piece's number to its Shard; model and grader live as long as the
    context."""
    from entrograd.models.load import load_tokenizer

    known, reader = Prompts(prompts), PieceReader(pieces)
    score, policy = scorer(params, model, temperature)
    tokenizer = functools.cache(load_tokenizer)
    with Grader(params.grader) as grader:
        cluster = clusterer(params.clusters, grader, params.device)

        def work(index: int) -> Shard:
            piece, table = pieces[index], reader.read(index)
            try:
                table = complete(table, known, tokenizer(model) if lacks_tokens(table) else None)
                groups = groups_of(table, str(piece.file), piece.first_row)
                statistics = annotate_groups(groups, known, score, grader, cluster, params)
            except InputError as error:
                message = str(error).removeprefix(f"{piece.file}: ")
                raise InputError(f"{piece.file}: {message}") from None
            return Shard(
                table_of(groups, "annotated"),
                pa.Table.from_pylist(list(map(asdict, statistics)), SCHEMAS["groups"]),
                policy,
                frozenset(table["policy_version"].unique().to_pylist()) - {policy},
            )

        yield work


def _rated(shard: Path) -> list[dict[str, object]]:
    """The rows of a shard with what `summarise_heads` reads of them."""
    columns = ["prompt_id", "sample_index", "reward_heads"]
    rows: list[dict[str, Any]] = pq.read_table(shard, columns=columns).to_pylist()
    return rows


def _temperature(origin: Provenance, rollouts: Path) -> float:
    """The sampling temperature, at which logprobs and entropies are taken. Greedy completions
    are scored at 1, where every token has a finite log-probability."""
    sampling = origin.get("sampling")
    if not sampling:
        log.info("%s does not say how it was sampled: scored at temperature 1", rollouts)
        return 1.0
    return float(sampling["temperature"]) or 1.0


def _note_other_policies(samplers: Mapping[str, Collection[str]], rollouts: Path) -> None:
    for policy, others in samplers.items():
        if others:
            log.warning(
                "%s: sampled by %s, annotated by %s: old_logprobs are the latter's; for another "
                "dtype or device of the same weights that is expected",
                rollouts,
                ", ".join(sorted(others)),
                policy,
            )
