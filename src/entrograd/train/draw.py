"""Drawing a round of online training: prompts, completions, their grades and annotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from entrograd.annotate.clusters import clusterer
from entrograd.annotate.groups import annotate_rows
from entrograd.annotate.params import AnnotateParams
from entrograd.annotate.summary import WATCHED, check_alarms, summarise_rows
from entrograd.data.groups import PromptGroup, groups_of, table_of
from entrograd.methods.recipe import Recipe
from entrograd.rewards.verify.grade import Grader
from entrograd.rollout.engine import Engine, Request
from entrograd.rollout.rollout import group_requests, rollout_rows
from entrograd.storage.schemas import SCHEMAS
from entrograd.train.curve import Stopwatch
from entrograd.train.dynamic import Filled, fill, has_signal
from entrograd.train.params import TrainOnlineStage
from entrograd.train.policy import Policy
from entrograd.train.required_columns import check_columns
from entrograd.train.rounds import PromptOrder, Round, round_seed
from entrograd.train.scoring import Scoring

Statistics = list[dict[str, Any]]  # rows of the groups table


class TrainingPrompts:
    """The encoded training prompts, and the order in which rounds draw them."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], order: PromptOrder) -> None:
        self.rows, self.order = rows, order
        self.by_id = {row["prompt_id"]: row for row in rows}
        self.places = {row["prompt_id"]: index for index, row in enumerate(rows)}

    def take(self, count: int, used: set[int]) -> list[Mapping[str, Any]]:
        """The next `count` prompts beside those at the places `used`, to which theirs are added;
        fewer where no more are left."""
        return [self.rows[place] for place in self.order.take(count, used)]


class Annotator:
    """Grades and annotates groups: `score` with the policy in training, `grader` their answers."""

    def __init__(
        self,
        params: AnnotateParams,
        prompts: Mapping[str, Mapping[str, Any]],
        score: Scoring,
        grader: Grader,
        stopwatch: Stopwatch,
    ) -> None:
        self.params, self.prompts, self.score, self.grader = params, prompts, score, grader
        self.stopwatch = stopwatch
        self.cluster = clusterer(params.clusters, grader, params.device)

    def __call__(self, groups: Sequence[PromptGroup]) -> tuple[list[PromptGroup], Statistics]:
        """(the groups annotated, the statistics of each)."""

        def score(rows: Sequence[Mapping[str, Any]]) -> list[tuple[list[float], list[float]]]:
            scored = _groups(rows, "rollouts")
            completions = (c for group in scored for c in group.completions)
            for completion, row in zip(completions, rows, strict=True):
                completion.reward = row["reward"]
            return [(a.tolist(), b.tolist()) for a, b in self.score(scored)]

        rows, statistics = annotate_rows(
            table_of(groups, "rollouts").to_pylist(),
            self.prompts,
            score,
            self.grader,
            self.cluster,
            self.params,
        )
        return _groups(rows, "annotated"), statistics


class RoundDrawer:
    """Draws rounds of `prompts` with the engine's policy.

    Several processes share the prompts of a draw out among themselves; each gets the whole round.
    """

    def __init__(
        self,
        *,
        params: TrainOnlineStage,
        recipe: Recipe,
        policy: Policy,
        prompts: TrainingPrompts,
        engine: Engine,
        annotator: Annotator,
    ) -> None:
        self.params, self.recipe, self.policy = params, recipe, policy
        self.prompts, self.engine, self.annotator = prompts, engine, annotator

    def draw(
        self, number: int, before: Round | None, sampled: list[PromptGroup] | None = None
    ) -> Round:
        """Round `number`; with dynamic sampling it begins with what the round `before` left.
        `sampled`: its rollouts (this process's), if they were drawn ahead."""
        online = self.params.train_online
        dynamic, wanted = online.dynamic_sampling, online.prompts_per_round
        carried = before.surplus if before else []
        used = {self.prompts.places[group.prompt_id] for group in carried}
        seen: list[PromptGroup] = []
        statistics: Statistics = []

        def sample(count: int) -> list[PromptGroup]:
            own = sampled
            if own is None:
                own = self.sample(number, self.requests(self.prompts.take(count, used)))
            groups, measured = self._annotate(number, own)
            seen.extend(groups)
            statistics.extend(measured)
            return groups

        if dynamic is None:
            filled = Filled(sample(wanted), [], 1.0, {})
        else:
            share = before.share if before else 1.0
            signal = partial(has_signal, self.recipe, device=self.policy.model.device)
            filled = fill(wanted, carried, share, sample, signal, dynamic)
        return Round(
            groups=filled.groups,
            measured={**self._watched(number, seen, statistics), **filled.measured},
            order=self.prompts.order.position(),
            carried=len(carried),
            surplus=filled.surplus,
            share=filled.share,
        )

    def next_requests(self) -> list[Request]:
        """This process's part of the requests for a whole round."""
        return self.requests(self.prompts.take(self.prompts.order.per_round, set()))

    def requests(self, prompts: Sequence[Mapping[str, Any]]) -> list[Request]:
        """This process's part of the requests for these prompts."""
        mine = self.policy.processes.share(prompts)
        return group_requests(mine, self.params.rollout.group_size)

    def sample(self, number: int, requests: Sequence[Request]) -> list[PromptGroup]:
        """Groups of rollouts, drawn by the engine with the seed of round `number`."""
        if not requests:
            return []
        seed = round_seed(self.params.train_online.seed, number)
        with self.annotator.stopwatch.phase("sample"):
            completions = self.engine.generate(requests, self.params.rollout.sampling, seed)
        return _groups(rollout_rows(requests, completions, seed, self.engine), "rollouts")

    def _annotate(
        self, number: int, sampled: list[PromptGroup]
    ) -> tuple[list[PromptGroup], Statistics]:
        """(annotated groups, the statistics of each) of what every process sampled."""
        with self.annotator.stopwatch.phase("annotate"):
            groups, statistics = self.annotator(sampled) if sampled else ([], [])
        processes = self.policy.processes
        processes.check_equal(self.engine.policy_version, "the policy")
        groups = processes.gather(groups)
        table = table_of(groups, "annotated")
        check_columns(self.recipe, table, where=f"round {number + 1}")
        return groups, processes.gather(statistics)

    def _watched(
        self, number: int, groups: Sequence[PromptGroup], statistics: Statistics
    ) -> dict[str, float]:
        """What the curve has of the groups that were drawn, and how many alarms they raise."""
        if not groups:  # the round before left enough: this policy has drawn nothing
            return {"alarms": 0.0}
        summary = summarise_rows(table_of(groups, "annotated").to_pylist(), statistics)
        alarms = check_alarms(summary, self.params.annotate.alarms, f"round {number + 1}")
        rewards = [completion.reward for group in groups for completion in group.completions]
        return {
            "reward_mean": float(np.mean(rewards)),
            "semantic_entropy": float(np.mean([g["semantic_entropy_rao"] for g in statistics])),
            **{f"{status}_fraction": summary["status"][status] for status in WATCHED},
            "alarms": float(alarms),
        }


def _groups(rows: Sequence[Mapping[str, Any]], name: str) -> list[PromptGroup]:
    table = pa.Table.from_pylist([dict(row) for row in rows], SCHEMAS[name])
    return groups_of(table, name)
