"""Where a round of online training comes from: drawn now, ahead, or by a run that was killed."""

from __future__ import annotations

from dataclasses import replace

from entrograd.train.draw import RoundDrawer
from entrograd.train.heldout import Heldout
from entrograd.train.policy import Policy
from entrograd.train.prefetch import Prefetch
from entrograd.train.rounds import Round, Rounds
from entrograd.train.scoring import CachedForward


class RolloutSource:
    """Gives out rounds in order. `prefetch` draws all but the first, if it is given; `stored` holds
    every round from before its first update on. With dynamic sampling a round begins with what the
    one before it left.
    """

    def __init__(
        self, drawer: RoundDrawer, stored: Rounds, heldout: Heldout, prefetch: Prefetch | None
    ) -> None:
        self.drawer, self.stored = drawer, stored
        self.heldout, self.prefetch = heldout, prefetch
        self.dynamic = drawer.params.train_online.dynamic_sampling is not None
        # What scoring caches is of one draw's completions, in one process: of use if those are the
        # round.
        self.caches = not self.dynamic and drawer.policy.processes.count == 1
        self._round: Round | None = None

    def round(self, number: int, part: int) -> Round:
        """The round that update `part` of round `number` is made on."""
        if self._round is None or part == 0:
            self._round = self._next(number, part, self._round)
        return self._round

    def cached_forward(self) -> CachedForward | None:
        """The graph of what scoring the round computed: for its first update, once."""
        cached = self.drawer.annotator.score.take()
        return cached if self.caches else None

    def finish_round(self, policy: Policy) -> None:
        """After a round's last update: what is drawn ahead is stored, then the engine gets the
        weights of now."""
        if self.prefetch:
            self.prefetch.finish()
        self.update_weights(policy)

    def update_weights(self, policy: Policy) -> None:
        """Give the engine the weights of now."""
        self.drawer.engine.update_weights(policy.sampler())
        policy.processes.wait()

    def position(self) -> dict[str, object]:
        """What a checkpoint must know to go on from here, as JSON."""
        position: dict[str, object] = {
            "order": self.drawer.prompts.order.position(),
            "policy_version": self.drawer.engine.policy_version,
        }
        return {**position, "sampler": self.prefetch.sampler} if self.prefetch else position

    def _next(self, number: int, part: int, before: Round | None) -> Round:
        if self.prefetch and number:
            sampled = self.prefetch.take(number)
            measured = self._heldout(number)
            self.prefetch.start(number + 1)  # the engine draws while this round is graded, too
            return self._store(number, self.drawer.draw(number, None, sampled), measured)
        version = self.drawer.engine.policy_version if part == 0 else None
        found = self.stored.read(number, version)
        if found:
            self.drawer.prompts.order.restore(found.order)
            if part == 0 and self.caches:
                self.drawer.annotator.score(found.groups)  # the same forward gives the same graph
        else:
            if before is None and self.dynamic and number:
                before = self.stored.read(number - 1, None)
            measured = self._heldout(number)
            found = self._store(number, self.drawer.draw(number, before), measured)
        if self.prefetch:
            self.prefetch.start(number + 1)
        return found

    def _heldout(self, number: int) -> dict[str, float]:
        drawer, annotator = self.drawer, self.drawer.annotator
        with annotator.stopwatch.phase("evaluate"):
            return self.heldout.measure(
                number, drawer.engine, annotator.grader, drawer.policy.processes
            )

    def _store(self, number: int, drawn: Round, measured: dict[str, float]) -> Round:
        """The round as it is read from the disk: a run that goes on has nothing else."""
        processes = self.drawer.policy.processes
        if processes.main:
            self.stored.write(number, replace(drawn, measured={**drawn.measured, **measured}))
        processes.wait()
        found = self.stored.read(number, None)
        assert found
        return found
