"""Groups of completions annotated: rewards, token entropies, clusters, semantic entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from entrograd.annotate import semantic_entropy
from entrograd.annotate.clusters import Clusterer, Clustering, Group
from entrograd.annotate.params import AnnotateParams
from entrograd.annotate.token_entropy import Score, label, token_values
from entrograd.data.groups import Completion, PromptGroup
from entrograd.data.prompt import PromptRow
from entrograd.errors import InputError
from entrograd.numerics.kernel_language import kernel_language
from entrograd.rewards import heads
from entrograd.rewards.verify.grade import Grader, Item


@dataclass(frozen=True, slots=True)
class GroupStatistics:
    """A row of the groups table; entropies in nats."""

    prompt_id: str
    completions: int
    mean_reward: float
    clusters: int
    semantic_entropy_rao: float
    semantic_entropy_discrete: float
    semantic_entropy_paper: float
    mean_token_entropy: float  # over all tokens of the group
    kernel_language_entropy: float


def annotate_groups(
    groups: Sequence[PromptGroup],
    prompts: Mapping[str, PromptRow],
    score: Score,
    grader: Grader,
    cluster: Clusterer,
    params: AnnotateParams,
) -> list[GroupStatistics]:
    """Annotate groups of rollouts in place: their completions get all that schema `annotated` has
    beside `rollouts`.

    Args:
        groups: as `groups_of` makes them.
        prompts: prompt_id -> its row of schema `prompts`.
        score: groups, with their rewards -> (logprobs, entropies) of each completion, nats.
        grader: an open Grader.
        cluster: what `clusterer` returned for `params.clusters`.
        params: section annotate.

    Returns the statistics of each group. InputError names the completion that cannot be annotated.
    """
    rows = {
        group.prompt_id: prompts[group.prompt_id] for group in groups if group.prompt_id in prompts
    }
    _check_groups(groups, rows)
    pairs = [(group, completion) for group in groups for completion in group.completions]
    grades = grader.grade(
        [
            Item(tuple(rows[group.prompt_id]["answers"]), each.completion_text, each.finish_reason)
            for group, each in pairs
        ]
    )
    rates = heads.load(params.heads)
    for (_, completion), grade in zip(pairs, grades, strict=True):
        completion.answer, completion.extraction_rule = grade.answer, grade.rule
        completion.reward, completion.reward_status = grade.reward, grade.status
        completion.reward_heads = heads.ratings(rates, completion.completion_text)
    for (_, completion), values in zip(pairs, token_values(groups, score), strict=True):
        completion.tokens["old_logprobs"], completion.tokens["entropies"] = values
    if params.segments is not None:
        from entrograd.annotate.segments import segment_ids

        segments = segment_ids([each.tokens["entropies"] for _, each in pairs], params.segments)
        for (_, completion), ids in zip(pairs, segments, strict=True):
            completion.tokens["segment_ids"] = ids
    ordered = [sorted(group.completions, key=lambda each: each.sample_index) for group in groups]
    clusterings = cluster(
        [
            Group(
                rows[group.prompt_id]["problem"],
                [completion.completion_text for completion in members],
                [completion.answer for completion in members],
            )
            for group, members in zip(groups, ordered, strict=True)
        ]
    )
    return [
        _statistics(group.prompt_id, members, clustering)
        for group, members, clustering in zip(groups, ordered, clusterings, strict=True)
    ]


def _statistics(
    prompt_id: str, members: Sequence[Completion], clustering: Clustering
) -> GroupStatistics:
    """Of one group, its completions by sample_index, which get their cluster."""
    ids = clustering.ids
    for completion, cluster_id in zip(members, ids, strict=True):
        completion.cluster_id = cluster_id
    ell = [_mean(completion.tokens["old_logprobs"]) for completion in members]
    return GroupStatistics(
        prompt_id=prompt_id,
        completions=len(members),
        mean_reward=sum(completion.reward or 0.0 for completion in members) / len(members),
        clusters=len(set(ids)),
        semantic_entropy_rao=semantic_entropy.rao(ids, ell),
        semantic_entropy_discrete=semantic_entropy.discrete(ids),
        semantic_entropy_paper=semantic_entropy.paper(ids, ell),
        mean_token_entropy=_mean(np.concatenate([each.tokens["entropies"] for each in members])),
        kernel_language_entropy=kernel_language(clustering.weights),
    )


def _mean(values: np.ndarray) -> float:
    """In float64, the values added one after another."""
    return float(np.cumsum(values, dtype=np.float64)[-1]) / len(values)


def _check_groups(groups: Sequence[PromptGroup], prompts: Mapping[str, PromptRow]) -> None:
    for group in groups:
        if group.prompt_id not in prompts or not prompts[group.prompt_id]["answers"]:
            raise InputError(
                f"prompt_id {group.prompt_id}: no accepted answer; the prompts table lacks it"
            )
        seen: set[int] = set()
        for completion in group.completions:
            if completion.sample_index in seen:
                raise InputError(
                    f"{label(group, completion)}: appears twice; number a group's samples"
                )
            seen.add(completion.sample_index)
