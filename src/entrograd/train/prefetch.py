"""Prefetch: a round's completions drawn while the updates of the round before run."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from entrograd.data.groups import PromptGroup
from entrograd.errors import InputError
from entrograd.train.draw import RoundDrawer
from entrograd.train.processes import Processes
from entrograd.train.rounds import Rounds


class Prefetch:
    """Draws rounds 1 to `rounds` - 1, each by the weights that the round before it started from.

    The completions are stored before those weights are replaced and before a checkpoint is written,
    so a run that goes on from one finds them: the policy that drew them is gone. `sampler` is its
    version, part of a checkpoint. Only the engine works beside the updates.
    """

    def __init__(
        self,
        drawer: RoundDrawer,
        kept: Rounds,
        processes: Processes,
        rounds: int,
        sampler: str | None,
    ) -> None:
        self.drawer, self.kept, self.processes = drawer, kept, processes
        self.rounds, self.sampler = rounds, sampler
        self._pool = ThreadPoolExecutor(1)
        self._drawing: Future[list[PromptGroup]] | None = None
        self._number = 0

    def start(self, number: int) -> None:
        """Begin to draw round `number`, where there is one that is not stored already."""
        if number >= self.rounds:
            return
        self._number, self.sampler = number, self.drawer.engine.policy_version
        requests = self.drawer.next_requests()
        if self.kept.read_ahead(number, self.sampler) is None:
            self._drawing = self._pool.submit(self.drawer.sample, number, requests)

    def finish(self) -> None:
        """Wait for what `start` began and store it; raises what the engine raised."""
        if self._drawing is not None:
            groups = self.processes.gather(self._drawing.result())
            if self.processes.main:
                self.kept.write_ahead(self._number, groups)
            self._drawing = None
        self.processes.wait()

    def take(self, number: int) -> list[PromptGroup]:
        """This process's part of round `number`, finished before; InputError where it is lost."""
        groups = self.kept.read_ahead(number, self.sampler or "")
        if groups is None:
            raise InputError(
                f"{self.kept.folder}: the completions of round {number + 1} are lost, and the "
                "policy that drew them is gone; remove the folder to start anew"
            )
        return self.processes.share(groups)

    def close(self) -> None:
        """Wait for what is being drawn: an engine is closed by nobody while it draws."""
        self._pool.shutdown()
