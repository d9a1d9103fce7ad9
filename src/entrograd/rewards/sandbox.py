"""Workers with hard limits: requests answered by processes that are killed when they take too long.

A worker is `python -m MODULE`, a module of this package that calls `sandbox_worker.serve`; it
starts with that module's imports and nothing else and speaks JSON lines over its pipes.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from entrograd.rewards.sandbox_worker import WALL, Reply, say

START_SECONDS = 600.0  # a crowded machine; a worker that fails is noticed at once
_GRACE_SECONDS = 30.0  # a worker enforces its limits itself; this much later it is given up
_SOURCE = Path(__file__).parent.parent.parent
_WORTH_A_WORKER = 16  # requests; starting a worker takes seconds


class WorkerStartError(RuntimeError):
    """A worker ended, or said nothing, before it was ready; the message holds its last words."""


@dataclass(frozen=True)
class Outcome:
    """What became of a request: done (with its value), timeout (its process was killed), or error
    (it raised, with the exception's name as value, or died)."""

    kind: Literal["done", "timeout", "error"]
    value: Any = None


class HardLimitPool:
    """Up to `workers` workers of `module`; each request may take `seconds` of processor time (and
    ten times that by the clock) and `memory_mb` MiB of address space. Processor time, so that a
    crowded machine does not change what times out. Workers start when requests need them."""

    def __init__(self, module: str, workers: int, seconds: float, memory_mb: int) -> None:
        self.module, self.count, self.seconds, self.memory_mb = module, workers, seconds, memory_mb
        self._workers: list[_Worker] = []

    def __enter__(self) -> HardLimitPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def map(self, requests: Sequence[object]) -> list[Outcome]:
        """One outcome a request, in order. WorkerStartError where workers cannot start."""
        outcomes: dict[int, Outcome] = {}
        pending = deque(range(len(requests)))
        again: set[int] = set()
        try:
            while len(outcomes) < len(requests):
                self._start(len(requests) - len(outcomes))
                for worker in self._workers:
                    if pending and worker.idle:
                        self._give(worker, pending, requests)
                for index, outcome in self._collect():
                    if outcome is None and index not in again:
                        again.add(index)  # a worker was killed from outside
                        pending.appendleft(index)
                    else:
                        outcomes[index] = outcome or Outcome("error", "Died")
        except BaseException:
            self.close()  # a worker may hold a request of this call
            raise
        return [outcomes[index] for index in range(len(requests))]

    def _start(self, unfinished: int) -> None:
        for worker in self._workers:
            if worker.idle and worker.process.poll() is not None:
                worker.kill()
        self._workers = [worker for worker in self._workers if not worker.gone]
        wanted = min(self.count, -(-unfinished // _WORTH_A_WORKER))
        while len(self._workers) < wanted:
            self._workers.append(_Worker(self.module, self.memory_mb, self.seconds))

    def _give(self, worker: _Worker, pending: deque[int], requests: Sequence[object]) -> None:
        index = pending.popleft()
        if worker.send(requests[index]):
            worker.request = index
            worker.deadline = time.monotonic() + WALL * self.seconds + _GRACE_SECONDS
        else:  # it died while idle: not this request's doing
            pending.appendleft(index)
            worker.kill()

    def _collect(self) -> Iterator[tuple[int, Outcome | None]]:
        """Wait for something to happen: the requests it concerns, None where a worker was lost."""
        waiting = [worker for worker in self._workers if not worker.idle and not worker.gone]
        if not waiting:
            return
        with selectors.DefaultSelector() as selector:
            for worker in waiting:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            soonest = min(worker.deadline for worker in waiting)
            readable = {
                key.data for key, _ in selector.select(max(0.0, soonest - time.monotonic()))
            }
        now = time.monotonic()
        for worker in waiting:
            reply = worker.receive() if worker in readable else None
            if reply == "" or (reply is None and now >= worker.deadline):
                worker.kill()
                if not worker.ready:
                    raise WorkerStartError(f"{self.module} did not start: {worker.last_words()}")
                if worker.request is not None:
                    yield worker.request, None if reply == "" else Outcome("timeout")
            elif reply is not None:
                value: Reply | str = json.loads(reply)
                if isinstance(value, str):  # READY
                    worker.ready = True
                elif worker.request is not None:
                    yield worker.request, Outcome(value["kind"], value["value"])
                worker.request = None


class _Worker:
    """One process, what it is busy with and until when."""

    def __init__(self, module: str, memory_mb: int, seconds: float) -> None:
        paths = [str(_SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONHASHSEED": "0",
            "PYTHONIOENCODING": "utf-8",
        }
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(memory_mb), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        os.set_blocking(self.replies.fileno(), False)
        self.ready = self.gone = False
        self.request: int | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self._buffer, self._words = b"", ""

    @property
    def idle(self) -> bool:
        return self.ready and self.request is None and not self.gone

    def send(self, request: object) -> bool:
        """Whether the request reached the process's pipe."""
        try:
            say(self.requests, request)
        except OSError:
            return False
        return True

    def receive(self) -> str | None:
        """A whole line, "" at the end of the stream, None where a line is still incomplete."""
        try:
            part = os.read(self.replies.fileno(), 1 << 16)
        except BlockingIOError:
            return None
        if not part:
            return ""
        self._buffer += part
        line, newline, rest = self._buffer.partition(b"\n")
        if not newline:
            return None
        self._buffer = rest
        return line.decode("ascii")

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        if self.gone:
            return
        self.gone = True
        self.process.kill()
        self.process.wait()
        self._errors.seek(0)
        self._words = self._errors.read()[-2000:].decode("utf-8", "replace").strip()
        for stream in (self.requests, self.replies, self._errors):
            with contextlib.suppress(OSError):
                stream.close()

    def last_words(self) -> str:  # of its standard error
        return (self._words.splitlines() or [f"no reply in {START_SECONDS:.0f} s"])[-1]
