"""Stage annotate: reward, token entropies, clusters and semantic entropy of stored rollouts.

A shard of rollouts becomes a shard of annotated rows, whole or not at all; finished ones are kept
when the stage is run again after an interruption.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from entrograd import io
from entrograd.annotate import semantic_entropy
from entrograd.annotate.clusters import Clusterer, Clustering, Group, clusterer
from entrograd.annotate.completions import (
    Piece,
    PieceReader,
    Prompts,
    complete,
    lacks_tokens,
    plan,
)
from entrograd.annotate.reward_weights import summarise_heads
from entrograd.annotate.summary import check_alarms, summarise
from entrograd.annotate.token_entropy import Score, TokenValues, name, scorer, token_values
from entrograd.errors import InputError, Unfinished
from entrograd.params import AnnotateParams
from entrograd.progress import progress
from entrograd.schemas import TABLES
from entrograd.shards import chosen_shards, map_shards
from entrograd.verify import heads
from entrograd.verify.grade import Grade, Grader, Item

log = logging.getLogger("entrograd")

Rows = list[dict[str, Any]]


def annotate_rows(
    rows: Sequence[Mapping[str, Any]],
    prompts: Mapping[str, Mapping[str, Any]],
    score: Score,
    grader: Grader,
    cluster: Clusterer,
    params: AnnotateParams,
) -> tuple[Rows, Rows]:
    """Annotate whole groups of rollouts.

    Args:
        rows: of schema `rollouts`; rows of one prompt_id are a group.
        prompts: prompt_id -> its row of schema `prompts`.
        score: rows, with their reward -> (logprobs, entropies) of each, nats, one value a
            completion token.
        grader: an open Grader.
        cluster: what `clusterer` returned for `params.clusters`.
        params: section annotate.

    Returns rows of schema `annotated`, in the order given, and one row of schema `groups` a
    prompt, in order of first appearance. InputError names the row that cannot be annotated.
    """
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row["prompt_id"], []).append(index)
    known = {name: prompts[name] for name in groups if name in prompts}
    _check_groups(rows, groups, known)
    for members in groups.values():
        members.sort(key=lambda index: rows[index]["sample_index"])
    grades = grader.grade(
        [
            Item(tuple(known[r["prompt_id"]]["answers"]), r["completion_text"], r["finish_reason"])
            for r in rows
        ]
    )
    rates = heads.load(params.heads)
    ratings = [heads.ratings(rates, row["completion_text"]) for row in rows]
    graded = [{**row, "reward": grade.reward} for row, grade in zip(rows, grades, strict=True)]
    values = token_values(graded, score)
    clusterings = cluster(
        [
            Group(
                known[name]["problem"],
                [rows[index]["completion_text"] for index in members],
                [grades[index].answer for index in members],
            )
            for name, members in groups.items()
        ]
    )
    segments: Sequence[list[int] | None] = [None] * len(rows)
    if params.segments is not None:
        from entrograd.annotate.segments import segment_ids

        segments = segment_ids([entropies for _, entropies in values], params.segments)
    annotated = [
        _annotated_row(*cells)
        for cells in zip(rows, grades, ratings, values, segments, strict=True)
    ]
    for members, clustering in zip(groups.values(), clusterings, strict=True):
        for index, cluster_id in zip(members, clustering.ids, strict=True):
            annotated[index]["cluster_id"] = cluster_id
    return annotated, [
        _group_row(name, [annotated[index] for index in members], clustering)
        for (name, members), clustering in zip(groups.items(), clusterings, strict=True)
    ]


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
    files = io.shard_files(rollouts) if rollouts.is_dir() else [rollouts]
    pieces = plan(files, Prompts(prompts))
    origin = io.provenance(files[0])
    names = [io.shard_name(index) for index in range(len(pieces))]
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
            io.write_table(done_groups / names[index], shard.groups, "groups", **noted)
            io.write_table(done / names[index], shard.rows, "annotated", **noted)
            samplers.setdefault(shard.policy, set()).update(shard.samplers)
            bar.advance(pieces[index].rows)
    _note_other_policies(samplers, rollouts)
    if left := absent():
        raise Unfinished(f"{len(missing)} shards computed, {len(left)} of {len(names)} left")
    values = summarise([done / shard for shard in names], [done_groups / shard for shard in names])
    check_alarms(values, params.alarms)
    table = pa.concat_tables(io.read_table(done_groups / shard, "groups") for shard in names)
    io.assemble(done, out, names)
    io.write_table(groups, table, "groups", **io.provenance(done / names[0]))
    io.write_json(summary, values)
    io.write_json(reward_heads, summarise_heads(map(_rated, (out / s for s in names))))
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
            rows = reader.read(index)
            try:
                rows = complete(rows, known, tokenizer(model) if lacks_tokens(rows) else None)
                annotated, groups = annotate_rows(rows, known, score, grader, cluster, params)
            except InputError as error:
                raise InputError(f"{pieces[index].file}: {error}") from None
            return Shard(
                pa.Table.from_pylist(annotated, TABLES["annotated"]),
                pa.Table.from_pylist(groups, TABLES["groups"]),
                policy,
                frozenset(row["policy_version"] for row in rows) - {policy},
            )

        yield work


# --- rows ------------------------------------------------------------------------------------


def _annotated_row(
    row: Mapping[str, Any],
    grade: Grade,
    ratings: heads.Ratings | None,
    values: TokenValues,
    segments: list[int] | None,
) -> dict[str, Any]:
    """All columns of schema `annotated` but cluster_id."""
    old_logprobs, entropies = values
    return {
        **row,
        "answer": grade.answer,
        "extraction_rule": grade.rule,
        "reward": grade.reward,
        "reward_status": grade.status,
        "reward_heads": ratings,
        "old_logprobs": old_logprobs,
        "entropies": entropies,
        "segment_ids": segments,
        "token_scores": None,
    }


def _group_row(prompt_id: str, rows: Rows, clustering: Clustering) -> dict[str, Any]:
    """The statistics of one group, its rows by sample_index; the mean token entropy is over all
    its tokens."""
    ids = [row["cluster_id"] for row in rows]
    ell = [sum(row["old_logprobs"]) / len(row["old_logprobs"]) for row in rows]
    entropies = [value for row in rows for value in row["entropies"]]
    return {
        "prompt_id": prompt_id,
        "completions": len(rows),
        "mean_reward": sum(row["reward"] for row in rows) / len(rows),
        "clusters": len(set(ids)),
        "semantic_entropy_rao": semantic_entropy.rao(ids, ell),
        "semantic_entropy_discrete": semantic_entropy.discrete(ids),
        "semantic_entropy_paper": semantic_entropy.paper(ids, ell),
        "mean_token_entropy": sum(entropies) / len(entropies),
        "kernel_language_entropy": semantic_entropy.kernel_language(clustering.weights),
    }


def _check_groups(
    rows: Sequence[Mapping[str, Any]],
    groups: Mapping[str, list[int]],
    prompts: Mapping[str, Mapping[str, Any]],
) -> None:
    for prompt, members in groups.items():
        if prompt not in prompts or not prompts[prompt]["answers"]:
            raise InputError(f"prompt_id {prompt}: no accepted answer; the prompts table lacks it")
        seen: set[int] = set()
        for index in members:
            if rows[index]["sample_index"] in seen:
                raise InputError(f"{name(rows[index])}: appears twice; number a group's samples")
            seen.add(rows[index]["sample_index"])


# --- tables ------------------------------------------------------------------------


def _rated(shard: Path) -> Rows:
    """The rows of a shard with what `summarise_heads` reads of them."""
    rows: Rows = pq.read_table(
        shard, columns=["prompt_id", "sample_index", "reward_heads"]
    ).to_pylist()
    return rows


def _temperature(origin: Mapping[str, Any], rollouts: Path) -> float:
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
