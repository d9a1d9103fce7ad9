"""Drawing a round of online training: prompts, completions, their grades and annotations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from entrograd.annotate.clusters import clusterer
from entrograd.annotate.groups import GroupStatistics, annotate_groups
from entrograd.annotate.params import AnnotateParams
from entrograd.annotate.summary import WATCHED, check_alarms, summarise_groups
from entrograd.data.groups import PromptGroup, table_of
from entrograd.data.prompt import PromptRow
from entrograd.methods.recipe import Recipe
from entrograd.rewards.verify.grade import Grader
from entrograd.rollout.engine import Engine, Request
from entrograd.rollout.rollout import EncodedPrompt, group_requests, rollout_groups
from entrograd.train.curve import Stopwatch
from entrograd.train.dynamic import Filled, fill, has_signal
from entrograd.train.params import TrainOnlineStage
from entrograd.train.policy import Policy
from entrograd.train.required_columns import check_columns
from entrograd.train.rounds import PromptOrder, Round, round_seed
from entrograd.train.scoring import Scoring


class TrainingPrompts:
    """The training prompts, tokenised, their rows of the prompts table, and the order in which
    rounds draw them."""

    def __init__(
        self,
        encoded: Sequence[EncodedPrompt],
        rows: Mapping[str, PromptRow],
        order: PromptOrder,
    ) -> None:
        self.encoded, self.rows, self.order = encoded, rows, order
        self.places = {prompt.prompt_id: place for place, prompt in enumerate(encoded)}

    def take(self, count: int, used: set[int]) -> list[EncodedPrompt]:
        """The next `count` prompts beside those at the places `used`, to which theirs are added;
        fewer if no more are left."""
        return [self.encoded[place] for place in self.order.take(count, used)]


class Annotator:
    """Grades and annotates groups: `score` with the policy in training, `grader` their answers."""

    def __init__(
        self,
        params: AnnotateParams,
        prompts: Mapping[str, PromptRow],
        score: Scoring,
        grader: Grader,
        stopwatch: Stopwatch,
    ) -> None:
        self.params, self.prompts, self.score, self.grader = params, prompts, score, grader
        self.stopwatch = stopwatch
        self.cluster = clusterer(params.clusters, grader, params.device)

    def __call__(self, groups: Sequence[PromptGroup]) -> list[GroupStatistics]:
        """Annotate groups in place; returns the statistics of each."""
        with self.stopwatch.phase("annotate"):
            return annotate_groups(
                groups, self.prompts, self.score, self.grader, self.cluster, self.params
            )


class RoundDrawer:
    """Draws rounds of `prompts` with the engine's policy.

    Several processes share the prompts of a draw out among themselves; each gets the whole round.
    """

    def __init__(
        self,
        params: TrainOnlineStage,
        recipe: Recipe,
        policy: Policy,
        prompts: TrainingPrompts,
        *,
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
        statistics: list[GroupStatistics] = []

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
            signal_fraction = before.signal_fraction if before else 1.0
            signal = partial(has_signal, self.recipe, device=self.policy.model.device)
            filled = fill(wanted, carried, signal_fraction, sample, signal, dynamic)
        return Round(
            groups=filled.groups,
            measured={**self._watched(number, seen, statistics), **filled.measured},
            order=self.prompts.order.position(),
            carried=len(carried),
            surplus=filled.surplus,
            signal_fraction=filled.signal_fraction,
        )

    def next_requests(self) -> list[Request]:
        """This process's part of the requests for a whole round."""
        return self.requests(self.prompts.take(self.prompts.order.per_round, set()))

    def requests(self, prompts: Sequence[EncodedPrompt]) -> list[Request]:
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
        return rollout_groups(requests, completions, seed, self.engine)

    def _annotate(
        self, number: int, sampled: list[PromptGroup]
    ) -> tuple[list[PromptGroup], list[GroupStatistics]]:
        """(annotated groups, the statistics of each) of what every process sampled."""
        statistics = self.annotator(sampled) if sampled else []
        processes = self.policy.processes
        processes.check_equal(self.engine.policy_version, "the policy")
        groups = processes.gather(sampled)
        table = table_of(groups, "annotated")
        check_columns(self.recipe, table, where=f"round {number + 1}")
        return groups, processes.gather(statistics)

    def _watched(
        self, number: int, groups: Sequence[PromptGroup], statistics: Sequence[GroupStatistics]
    ) -> dict[str, float]:
        """What the curve has of the groups that were drawn, and how many alarms they raise."""
        if not groups:  # the round before left enough: this policy has drawn nothing
            return {"alarms": 0.0}
        summary = summarise_groups(groups, statistics)
        alarms = check_alarms(summary, self.params.annotate.alarms, f"round {number + 1}")
        rewards = [c.reward or 0.0 for group in groups for c in group.completions]
        return {
            "reward_mean": float(np.mean(rewards)),
            "semantic_entropy": float(np.mean([each.semantic_entropy_rao for each in statistics])),
            **{f"{status}_fraction": summary["status"][status] for status in WATCHED},
            "alarms": float(alarms),
        }
