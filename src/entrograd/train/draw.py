"""Drawing a round of online training: prompts, completions, their grades and annotations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from entrograd.annotate.clusters import clusterer
from entrograd.annotate.completions import Prompts
from entrograd.annotate.groups import GroupStatistics, annotate_groups
from entrograd.annotate.summary import WATCHED, check_alarms, summarise_groups
from entrograd.annotate.token_entropy import TokenValues
from entrograd.data.groups import PromptGroup, groups_of, table_of
from entrograd.methods.base import Recipe
from entrograd.rewards.verify.grade import Grader
from entrograd.rollout.engine import Engine, Request
from entrograd.rollout.rollout import EncodedPrompt, group_requests, rollout_groups
from entrograd.storage.schemas import SCHEMAS
from entrograd.train.dynamic import Filled, fill, has_signal
from entrograd.train.params import TrainOnlineStage
from entrograd.train.processes import Group, Processes, by_group
from entrograd.train.required_columns import check_columns
from entrograd.train.rounds import PromptOrder, Round, round_seed
from entrograd.train.scoring import Scoring


class RoundDrawer:
    """Draws rounds from the training prompts `rows`, encoded, in `order` with the engine's policy.

    Several processes share the prompts of a draw out among themselves; each gets the whole round.
    """

    def __init__(
        self,
        params: TrainOnlineStage,
        recipe: Recipe,
        rows: Sequence[EncodedPrompt],
        prompts: Prompts,
        order: PromptOrder,
        engine: Engine,
        scoring: Scoring,
        grader: Grader,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self.params, self.recipe, self.rows = params, recipe, rows
        self.order, self.engine, self.scoring, self.grader = order, engine, scoring, grader
        self.processes, self.device = processes, device
        self.cluster = clusterer(params.annotate.clusters, grader, params.annotate.device)
        self.prompts = prompts
        self.places = {row.prompt_id: index for index, row in enumerate(rows)}

    def draw(self, number: int, before: Round | None, sampled: Group | None = None) -> Round:
        """Round `number`; with dynamic sampling it begins with what the round `before` left.
        `sampled`: its rollouts (this process's), where they were drawn ahead."""
        online = self.params.train_online
        dynamic, wanted = online.dynamic_sampling, online.prompts_per_round
        carried = by_group(before.surplus) if before else []
        used = {self.places[group[0]["prompt_id"]] for group in carried}
        seen: Group = []
        statistics: list[GroupStatistics] = []

        def sample(count: int) -> list[Group]:
            own = sampled
            if own is None:
                own = self.sample(number, self.requests(self.order.take(count, used)))
            rows, groups = self._annotate(number, own)
            seen.extend(rows)
            statistics.extend(groups)
            return by_group(rows)

        if dynamic is None:
            filled = Filled(sample(wanted), [], 1.0, {})
        else:
            share = before.share if before else 1.0
            signal = partial(has_signal, self.recipe, device=self.device)
            filled = fill(wanted, carried, share, sample, signal, dynamic)
        batch = [row for group in filled.groups for row in group]
        return Round(
            rows=batch,
            measured={
                "reward_mean": float(np.mean([row["reward"] for row in seen or batch])),
                **self._watched(number, seen, statistics),
                **filled.measured,
            },
            order=self.order.position(),
            carried=sum(map(len, carried)),
            surplus=[row for group in filled.surplus for row in group],
            share=filled.share,
        )

    def _watched(
        self, number: int, rows: Group, statistics: list[GroupStatistics]
    ) -> dict[str, float]:
        """What the curve has of the rows that were drawn, and how many alarms they raise."""
        if not rows:  # the round before left enough
            none = dict.fromkeys((f"{status}_fraction" for status in WATCHED), 0.0)
            return {"semantic_entropy": 0.0, **none, "alarms": 0.0}
        summary = summarise_groups(_groups(rows, "annotated"), statistics)
        alarms = check_alarms(summary, self.params.annotate.alarms, f"round {number + 1}")
        return {
            "semantic_entropy": float(np.mean([each.semantic_entropy_rao for each in statistics])),
            **{f"{status}_fraction": summary["status"][status] for status in WATCHED},
            "alarms": float(alarms),
        }

    def next_prompts(self) -> list[int]:
        """The places of a whole round's prompts."""
        return next(self.order)

    def requests(self, places: Sequence[int]) -> list[Request]:
        """This process's part of the requests for the prompts at `places`."""
        mine = self.processes.share([self.rows[place] for place in places])
        return group_requests(mine, self.params.rollout.group_size)

    def sample(self, number: int, requests: Sequence[Request]) -> Group:
        """Rows of the rollouts schema, drawn by the engine with the seed of round `number`."""
        if not requests:
            return []
        seed = round_seed(self.params.train_online.seed, number)
        completions = self.engine.generate(requests, self.params.rollout.sampling, seed)
        groups = rollout_groups(requests, completions, seed, self.engine)
        rows: Group = table_of(groups, "rollouts").to_pylist()
        return rows

    def _annotate(self, number: int, sampled: Group) -> tuple[Group, list[GroupStatistics]]:
        """(annotated rows, their groups' statistics) of what every process sampled."""
        groups, statistics = _groups(sampled, "rollouts"), []
        if groups:
            statistics = annotate_groups(
                groups, self.prompts, self._score, self.grader, self.cluster, self.params.annotate
            )
        self.processes.check_equal(self.engine.policy_version, "the policy")
        annotated = self.processes.gather_groups(table_of(groups, "annotated").to_pylist())
        check_columns(self.recipe, annotated, f"round {number + 1}")
        return annotated, self.processes.gather(statistics)

    def _score(self, groups: Sequence[PromptGroup]) -> Sequence[TokenValues]:
        return self.scoring(
            [
                {
                    "prompt_id": group.prompt_id,
                    "prompt_ids": group.prompt_ids,
                    "completion_ids": completion.completion_ids,
                    "reward": completion.reward,
                }
                for group in groups
                for completion in group.completions
            ]
        )


def _groups(rows: Group, name: str) -> list[PromptGroup]:
    return groups_of(pa.Table.from_pylist(rows, SCHEMAS[name]), "round")
