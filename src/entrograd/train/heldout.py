"""Accuracy on held-out prompts while training: greedy completions by the engine in use."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc

from entrograd.data.prompt import encode
from entrograd.errors import InputError
from entrograd.models.load import load_tokenizer
from entrograd.rewards.verify.grade import Grader, Item
from entrograd.rollout.engine import Engine, Request, check_requests
from entrograd.rollout.engines import known_context
from entrograd.rollout.params import RolloutParams, Sampling
from entrograd.storage.tables import read_table
from entrograd.train.params import TrainOnlineParams
from entrograd.train.processes import Processes


class Heldout:
    """Measures `heldout_accuracy` in the rounds that `online.evaluate` names.

    Greedy completions draw nothing at random, so training is the same with and without it.
    InputError where the prompts table has too few held-out problems, or one does not fit.
    """

    def __init__(
        self, online: TrainOnlineParams, rollout: RolloutParams, prompts: Path, model: Path
    ) -> None:
        self.online = online
        self.sampling = Sampling(
            temperature=0.0,
            max_new_tokens=rollout.sampling.max_new_tokens,
            stop=rollout.sampling.stop,
        )
        self._requests: list[tuple[Request, tuple[str, ...]]] = []  # and the accepted answers
        if online.evaluate is None:
            return
        wanted = online.evaluate.problems
        table = read_table(prompts, "prompts").filter(pc.field("split") == "heldout")
        if table.num_rows < wanted:
            raise InputError(
                f"{prompts}: {table.num_rows} rows of split heldout, {wanted} wanted; raise "
                "prepare.heldout_fraction or lower train_online.evaluate.problems"
            )
        tokenizer = load_tokenizer(model)
        for row in table[:wanted].to_pylist():
            request = Request(row["prompt_id"], 0, tuple(encode(row, tokenizer)))
            self._requests.append((request, tuple(row["answers"])))
        try:
            requests = [request for request, _ in self._requests]
            check_requests(requests, self.sampling, known_context(rollout, model))
        except InputError as error:
            raise InputError(f"{prompts}: {error}") from None

    def measure(
        self, number: int, engine: Engine, grader: Grader, processes: Processes
    ) -> dict[str, float]:
        """heldout_accuracy of the engine's policy, the share of problems with the full reward, if
        round `number`, counted from 0, is one to measure; else {}. Several processes share the
        problems out; every one calls this."""
        evaluate, last = self.online.evaluate, self.online.rounds - 1
        if evaluate is None or (number % evaluate.every_rounds and number != last):
            return {}
        mine = processes.share(self._requests)
        completions = engine.generate([r for r, _ in mine], self.sampling, self.online.seed)
        grades = grader.grade(
            [
                Item(answers, completion.text, completion.finish_reason)
                for (_, answers), completion in zip(mine, completions, strict=True)
            ]
        )
        correct = processes.gather([grade.reward >= 1 for grade in grades])
        return {"heldout_accuracy": sum(correct) / len(correct)}
