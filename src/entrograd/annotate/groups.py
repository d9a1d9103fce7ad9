"""Whole groups of rollouts annotated: rewards, token entropies, clusters, semantic entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from entrograd.annotate import semantic_entropy
from entrograd.annotate.clusters import Clusterer, Clustering, Group
from entrograd.annotate.params import AnnotateParams
from entrograd.annotate.token_entropy import Score, TokenValues, name, token_values
from entrograd.errors import InputError
from entrograd.numerics.kernel_language import kernel_language
from entrograd.rewards import heads
from entrograd.rewards.verify.grade import Grade, Grader, Item

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
        "kernel_language_entropy": kernel_language(clustering.weights),
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
