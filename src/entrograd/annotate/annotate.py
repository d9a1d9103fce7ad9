"""Stage annotate: reward, token entropies, clusters and semantic entropy of stored rollouts.

A shard of rollouts becomes a shard of annotated rows, whole or not at all; finished ones are kept
when the stage is run again after an interruption.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from entrograd import io
from entrograd.annotate import semantic_entropy
from entrograd.annotate.clusters import answer_clusters
from entrograd.annotate.summary import check_alarms, summarise
from entrograd.annotate.token_entropy import Score, TokenValues, name, token_values
from entrograd.errors import InputError
from entrograd.params import AnnotateParams
from entrograd.progress import progress
from entrograd.verify.grade import Grade, Grader, Item

log = logging.getLogger("entrograd")

Rows = list[dict[str, Any]]


def annotate_rows(
    rows: Sequence[Mapping[str, Any]],
    answers: Mapping[str, Sequence[str]],
    score: Score,
    grader: Grader,
    params: AnnotateParams,  # noqa: ARG001 - `clusters` has one value so far, checked on reading
) -> tuple[Rows, Rows]:
    """Annotate whole groups of rollouts.

    Args:
        rows: of schema `rollouts`; rows of one prompt_id are a group.
        answers: prompt_id -> accepted answers.
        score: rows -> (logprobs, entropies) of each, nats, one value a completion token.
        grader: an open Grader.
        params: section annotate.

    Returns rows of schema `annotated`, in the order given, and one row of schema `groups` a
    prompt, in order of first appearance. InputError names the row that cannot be annotated.
    """
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row["prompt_id"], []).append(index)
    _check_groups(rows, groups, answers)
    grades = grader.grade(
        [
            Item(tuple(answers[r["prompt_id"]]), r["completion_text"], r["finish_reason"])
            for r in rows
        ]
    )
    values = token_values(rows, score)
    clusters = [0] * len(rows)
    for members in groups.values():
        ordered = sorted(members, key=lambda index: rows[index]["sample_index"])
        ids = answer_clusters([grades[index].answer for index in ordered])
        for index, cluster in zip(ordered, ids, strict=True):
            clusters[index] = cluster
    annotated = [
        _annotated_row(*columns) for columns in zip(rows, grades, values, clusters, strict=True)
    ]
    return annotated, [
        _group_row(prompt, [annotated[index] for index in members])
        for prompt, members in groups.items()
    ]


def annotate(
    params: AnnotateParams,
    prompts: Path,
    rollouts: Path,
    model: Path,
    out: Path,
    groups: Path,
    summary: Path,
    resume: Path,
) -> str:
    """Annotate a table of rollouts (a folder of shards, or one file) with the model in `model`.

    Writes shards to `out`, the groups table and the summary. Shards finished in `resume` by an
    interrupted run are kept. Returns the one-line result. InputError where a prompt is unknown,
    a row does not fit the model, or an alarm stops the stage.
    """
    answers = {
        row["prompt_id"]: row["answers"] for row in io.read_table(prompts, "prompts").to_pylist()
    }
    shards = io.shard_files(rollouts) if rollouts.is_dir() else [rollouts]
    sizes = _check_shards(shards, answers, prompts)
    origin = io.provenance(shards[0])
    names = [io.shard_name(index) for index in range(len(shards))]
    done, done_groups = resume / "annotated", resume / "groups"
    missing = [index for index, shard in enumerate(names) if not (done / shard).exists()]
    if len(missing) < len(names):
        log.info("%d of %d shards were finished before", len(names) - len(missing), len(names))
    if missing:
        score, policy = _scorer(params, model, _temperature(origin, rollouts))
        origin["annotate"] = {"grader": f"math-verify {version('math-verify')}", "model": policy}
        with (
            Grader(params.grader) as grader,
            progress(sum(sizes[i] for i in missing), "completions", "annotate") as bar,
        ):
            for index in missing:
                rows = io.read_table(shards[index], "rollouts").to_pylist()
                _note_other_policy(rows, policy, shards[index])
                try:
                    annotated, group_rows = annotate_rows(rows, answers, score, grader, params)
                except InputError as error:
                    raise InputError(f"{shards[index]}: {error}") from None
                # The groups first: a shard of annotated rows says that both are there.
                io.write_table(done_groups / names[index], group_rows, "groups", **origin)
                io.write_table(done / names[index], annotated, "annotated", **origin)
                bar.advance(len(rows))
    values = summarise([done / shard for shard in names], [done_groups / shard for shard in names])
    check_alarms(values, params.alarms)
    table = [
        row for shard in names for row in io.read_table(done_groups / shard, "groups").to_pylist()
    ]
    io.assemble(done, out, names)
    io.write_table(groups, table, "groups", **io.provenance(done / names[0]))
    io.write_json(summary, values)
    return (
        f"{values['completions']} completions of {values['groups']} prompts, "
        f"mean reward {values['mean_reward']:.3f}, "
        f"groups with signal {values['groups_with_signal']:.0%}"
    )


# --- rows ------------------------------------------------------------------------------------


def _annotated_row(
    row: Mapping[str, Any], grade: Grade, values: TokenValues, cluster: int
) -> dict[str, Any]:
    old_logprobs, entropies = values
    return {
        **row,
        "answer": grade.answer,
        "extraction_rule": grade.rule,
        "reward": grade.reward,
        "reward_status": grade.status,
        "reward_heads": None,
        "old_logprobs": old_logprobs,
        "entropies": entropies,
        "segment_ids": None,
        "cluster_id": cluster,
    }


def _group_row(prompt_id: str, rows: Rows) -> dict[str, Any]:
    """The statistics of one group; the mean token entropy is over all its tokens."""
    rows = sorted(rows, key=lambda row: row["sample_index"])
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
    }


def _check_groups(
    rows: Sequence[Mapping[str, Any]],
    groups: Mapping[str, list[int]],
    answers: Mapping[str, Sequence[str]],
) -> None:
    for prompt, members in groups.items():
        if not answers.get(prompt):
            raise InputError(f"prompt_id {prompt}: no accepted answer; the prompts table lacks it")
        seen: set[int] = set()
        for index in members:
            if rows[index]["sample_index"] in seen:
                raise InputError(f"{name(rows[index])}: appears twice; number a group's samples")
            seen.add(rows[index]["sample_index"])


# --- tables and model ------------------------------------------------------------------------


def _check_shards(shards: Sequence[Path], answers: Mapping[str, Any], prompts: Path) -> list[int]:
    """Rows of each shard; InputError for unknown prompts, split groups and an empty table."""
    home: dict[str, Path] = {}
    sizes = []
    for shard in shards:
        try:
            ids = pq.read_table(shard, columns=["prompt_id"]).column(0).to_pylist()
        except (OSError, ValueError, IndexError):  # the full reading says what is wrong
            ids = io.read_table(shard, "rollouts").column("prompt_id").to_pylist()
        for prompt in dict.fromkeys(ids):
            if prompt not in answers:
                raise InputError(
                    f"{shard}: prompt_id {prompt} is not in {prompts}; give the prompts table "
                    "these rollouts were drawn from"
                )
            if home.setdefault(prompt, shard) != shard:
                raise InputError(
                    f"{shard}: prompt_id {prompt} is also in {home[prompt].name}; keep a group "
                    "in one shard"
                )
        sizes.append(len(ids))
    if not sum(sizes):
        raise InputError(f"{shards[0]}: no rows; there is nothing to annotate")
    return sizes


def _temperature(origin: Mapping[str, Any], rollouts: Path) -> float:
    """The sampling temperature, at which logprobs and entropies are taken. Greedy completions
    are scored at 1, where every token has a finite log-probability."""
    sampling = origin.get("sampling")
    if not sampling:
        log.info("%s does not say how it was sampled: scored at temperature 1", rollouts)
        return 1.0
    return float(sampling["temperature"]) or 1.0


def _scorer(params: AnnotateParams, model: Path, temperature: float) -> tuple[Score, str]:
    """Load the model: the score function of rows, and the version of its weights."""
    from entrograd.models.forward import score
    from entrograd.models.load import context_length, load_model, policy_version

    loaded = load_model(model, params.dtype, params.device)
    vocabulary, context = loaded.get_input_embeddings().num_embeddings, context_length(loaded)

    def score_rows(rows: Rows) -> list[TokenValues]:
        for row in rows:
            _check_fits(row, vocabulary, context, model)
        return score(
            loaded,
            [row["prompt_ids"] for row in rows],
            [row["completion_ids"] for row in rows],
            temperature,
            params.token_budget,
        )

    return score_rows, policy_version(loaded)


def _check_fits(row: Mapping[str, Any], vocabulary: int, context: int, model: Path) -> None:
    tokens = [*row["prompt_ids"], *row["completion_ids"]]
    if len(tokens) > context:
        raise InputError(
            f"{name(row)}: {len(tokens)} tokens do not fit the context of {model} ({context}); "
            "drop the row or give the model that sampled it"
        )
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        raise InputError(
            f"{name(row)}: token {max(tokens)} is not in the vocabulary of {model} "
            f"({vocabulary}); give the model that sampled it"
        )


def _note_other_policy(rows: Rows, policy: str, shard: Path) -> None:
    others = {row["policy_version"] for row in rows} - {policy}
    if others:
        log.warning(
            "%s: sampled by %s, annotated by %s: old_logprobs are the latter's; for another "
            "dtype or device of the same weights that is expected",
            shard.name,
            ", ".join(sorted(others)),
            policy,
        )
