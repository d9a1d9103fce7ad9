"""Where a round of online training comes from: drawn now, ahead, or by a run that was killed."""

from __future__ import annotations

from entrograd.train.draw import RoundDrawer
from entrograd.train.prefetch import Prefetch
from entrograd.train.rounds import Round, Rounds


class RolloutSource:
    """Gives out rounds in order. `ahead` draws all but the first, where it is given; `kept` holds
    every round from before its first update on. With `dynamic` a round begins with what the one
    before it left; with `keep_graph` the first update finds the graph of what scoring computed.
    """

    def __init__(
        self,
        drawer: RoundDrawer,
        kept: Rounds,
        ahead: Prefetch | None,
        *,
        dynamic: bool,
        keep_graph: bool,
    ) -> None:
        self.drawer, self.kept, self.ahead = drawer, kept, ahead
        self.dynamic, self.keep_graph = dynamic, keep_graph
        self._round: Round | None = None

    def round(self, number: int, part: int) -> Round:
        """The round that update `part` of round `number` is made on."""
        if self._round is None or part == 0:
            self._round = self._next(number, part, self._round)
        return self._round

    def _next(self, number: int, part: int, before: Round | None) -> Round:
        if self.ahead and number:
            sampled = self.ahead.take(number)
            self.ahead.start(number + 1)  # the engine draws while this round is graded, too
            return self._stored(number, self.drawer.draw(number, None, sampled))
        found = self.kept.read(number, self.drawer.engine.policy_version if part == 0 else None)
        if found:
            self.drawer.order.restore(found.order)
            if part == 0 and self.keep_graph:
                self.drawer.scoring(found.rows)  # it is no file: the same forward gives it again
        else:
            if before is None and self.dynamic and number:
                before = self.kept.read(number - 1, None)
            found = self._stored(number, self.drawer.draw(number, before))
        if self.ahead:
            self.ahead.start(number + 1)
        return found

    def _stored(self, number: int, drawn: Round) -> Round:
        """The round as it is read from the disk: a run that goes on has nothing else."""
        if self.drawer.processes.main:
            self.kept.write(number, drawn)
        self.drawer.processes.wait()
        found = self.kept.read(number, None)
        assert found
        return found
