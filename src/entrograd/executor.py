"""Workers with hard limits: requests answered by processes that are killed when they take too long.

A worker is `python -m MODULE`, a module of this package that calls `serve`; it starts with that
module's imports and nothing else, speaks JSON lines over its pipes and ends with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

START_SECONDS = 120.0
_SOURCE = Path(__file__).parent.parent
_READY = "ready"


class WorkerStartError(RuntimeError):
    """A worker ended, or said nothing, before it was ready; the message holds its last words."""


@dataclass(frozen=True)
class Outcome:
    """What became of a request: done (with its value), timeout (the worker was killed), or error
    (the worker raised, with the exception's name as value, or died)."""

    kind: Literal["done", "timeout", "error"]
    value: Any = None


class HardLimitPool:
    """Up to `workers` processes of `module`; each request may take `seconds`, each process
    `memory_mb` MiB of address space. Processes are started when the first request needs them."""

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

    def map(self, requests: Sequence[Any]) -> list[Outcome]:
        """One outcome a request, in order. WorkerStartError where workers cannot start."""
        outcomes: dict[int, Outcome] = {}
        pending = deque(range(len(requests)))
        try:
            while len(outcomes) < len(requests):
                self._start(len(requests) - len(outcomes))
                for worker in self._workers:
                    if pending and worker.idle:
                        self._give(worker, pending, requests)
                self._collect(outcomes)
        except BaseException:
            self.close()  # a worker may hold a request of this call
            raise
        return [outcomes[index] for index in range(len(requests))]

    def _start(self, unfinished: int) -> None:
        for worker in self._workers:
            if worker.idle and worker.process.poll() is not None:
                worker.kill()
        self._workers = [worker for worker in self._workers if not worker.gone]
        while len(self._workers) < min(self.count, unfinished):
            self._workers.append(_Worker(self.module, self.memory_mb))

    def _give(self, worker: _Worker, pending: deque[int], requests: Sequence[Any]) -> None:
        index = pending.popleft()
        if worker.send(requests[index]):
            worker.request, worker.deadline = index, time.monotonic() + self.seconds
        else:  # it died while idle: not this request's doing
            pending.appendleft(index)
            worker.kill()

    def _collect(self, outcomes: dict[int, Outcome]) -> None:
        """Wait for a reply, a death or a deadline, and note what happened."""
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
            if reply == "":
                self._lost(worker, Outcome("error", "WorkerDied"), outcomes)
            elif reply is not None:
                self._answered(worker, json.loads(reply), outcomes)
            elif now >= worker.deadline:
                self._lost(worker, Outcome("timeout"), outcomes)

    def _answered(self, worker: _Worker, reply: Any, outcomes: dict[int, Outcome]) -> None:
        index, worker.request = worker.request, None
        if reply == _READY:
            worker.ready = True
        elif index is not None:
            outcomes[index] = Outcome(reply["kind"], reply["value"])

    def _lost(self, worker: _Worker, outcome: Outcome, outcomes: dict[int, Outcome]) -> None:
        worker.kill()
        if not worker.ready:
            raise WorkerStartError(f"{self.module} did not start: {worker.last_words()}")
        if worker.request is not None:
            outcomes[worker.request] = outcome


class _Worker:
    """One process, what it is busy with and until when."""

    def __init__(self, module: str, memory_mb: int) -> None:
        paths = [str(_SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONHASHSEED": "0",
            "PYTHONIOENCODING": "utf-8",
        }
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(memory_mb)],
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
        self._buffer = b""
        self._words = ""

    @property
    def idle(self) -> bool:
        return self.ready and self.request is None and not self.gone

    def send(self, request: Any) -> bool:
        """Whether the request reached the process's pipe."""
        try:
            self.requests.write(json.dumps(request).encode("ascii") + b"\n")
            self.requests.flush()
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

    def last_words(self) -> str:
        """The last line the process wrote to its standard error."""
        return (self._words.splitlines() or [f"no reply in {START_SECONDS:.0f} s"])[-1]


def serve(handle: Callable[[Any], Any], prepare: Callable[[], object]) -> None:
    """The life of a worker: `prepare`, say so, then answer requests until the pipe closes.

    The first command-line argument is the limit of address space in MiB. An exception of `handle`
    is reported by its name; after one that leaves the process in doubt it ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    limit = int(sys.argv[1]) << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)  # what a library prints is no reply

        def say(reply: Any) -> None:
            replies.write(json.dumps(reply).encode("ascii") + b"\n")
            replies.flush()

        prepare()
        say(_READY)
        for line in sys.stdin.buffer:
            try:
                reply = {"kind": "done", "value": handle(json.loads(line))}
            except (MemoryError, RecursionError) as error:
                say({"kind": "error", "value": type(error).__name__})
                return
            except Exception as error:
                reply = {"kind": "error", "value": type(error).__name__}
            say(reply)
