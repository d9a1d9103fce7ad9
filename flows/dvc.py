"""DVC as the flows see it: the graph in process, everything that runs as a guarded subprocess.

The Python API is right for the graph; the command line is right for running, since its output
can be streamed and it can be ended from outside.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from flows import ROOT, guard

TAIL_LINES = 15
MAX_LINE = 4000


class DvcError(Exception):
    """DVC or a stage did not do what was asked; the message says what and shows the last lines."""


class UnknownStage(DvcError):
    """No DVC project here, no such stage, or a dvc.yaml that DVC refuses."""


class StageFailed(DvcError):
    """The stage itself failed: a user's mistake (exit code 2) or a defect. It would fail again."""


class StageInterrupted(DvcError):
    """The machine's fault, not the stage's: killed by a signal, or locked by another DVC."""


class StageTimeout(DvcError):
    """The stage took longer than it may and was ended."""


class Stopped(DvcError):
    """The flow is ending: this stage was ended with it, or never begun."""


class State(StrEnum):
    """What DVC did about a stage."""

    RAN = "Ran"
    CACHED = "Cached"  # outputs checked out from the cache, nothing computed
    SKIPPED = "Skipped"  # up to date


@dataclass(frozen=True)
class Outcome:
    """A stage that succeeded."""

    stage: str
    state: State
    seconds: float


Emit = Callable[[str], None]

# Messages of dvc 3.67 (dvc/stage/__init__.py, cache.py, run.py); a test holds each of them.
_MESSAGES = (
    (re.compile(r"^Stage '(?P<stage>.+)' is cached - skipping run, checking out"), State.CACHED),
    (re.compile(r"^(?:Stage )?'(?P<stage>.+)' didn't change, skipping$"), State.SKIPPED),
    (re.compile(r"^Running stage '(?P<stage>.+)':$"), State.RAN),
)
_EXIT = re.compile(r"failed to run: .*, exited with (-?\d+)\s*$")
_BUSY = re.compile(r"is busy, it is being blocked by|Unable to acquire lock|is locked")


class Project:
    """One checkout's DVC pipeline. `stop` may be called from any thread; it is final."""

    def __init__(self, root: Path = ROOT, grace: float = guard.GRACE_SECONDS) -> None:
        self.root = root
        self.grace = grace
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def graph(self, targets: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
        """Each stage with the stages it depends on, upstream first; `targets` and what they need,
        or everything. Matrix stages are expanded (`train@grpo`).

        Raises UnknownStage.
        """
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
        from dvc.repo.reproduce import get_active_graph, plan_repro

        try:
            with Repo(str(self.root)) as repo:
                active = get_active_graph(repo.index.graph)
                address = {stage: self._address(stage) for stage in active}
                chosen = []
                for target in targets:
                    named = [s for s in active if target in (address[s], address[s].split("@")[0])]
                    if not named:
                        known = ", ".join(sorted(address.values()))
                        raise UnknownStage(f"{self.root}: no stage {target!r}; known: {known}")
                    chosen += named
                return {
                    address[stage]: tuple(sorted(address[s] for s in active.successors(stage)))
                    for stage in plan_repro(active, chosen or None)
                }
        except DvcException as error:
            raise UnknownStage(f"{self.root}: {_sentence(error)}") from error

    def _address(self, stage: Any) -> str:
        """A stage as a dvc command in `root` takes it (DVC's own depends on the current folder)."""
        file = os.path.relpath(stage.path, self.root)
        name = getattr(stage, "name", None)  # a file.dvc is a stage without one
        if name is None:
            return file
        return str(name) if file == "dvc.yaml" else f"{file}:{name}"

    def repro(
        self,
        stage: str,
        *,
        force: bool = False,
        timeout: float | None = None,
        emit: Emit | None = None,
    ) -> Outcome:
        """`dvc repro --single-item STAGE`; its output goes to `emit` line by line.

        Args:
            stage: as in `graph`; what it depends on must be up to date.
            force: run it even if nothing changed.
            timeout: seconds after which it is ended.

        Raises StageFailed, StageInterrupted, StageTimeout, Stopped; whatever is raised, no
        process of the stage is left.
        """
        start = time.monotonic()
        command = ["--wait-for-lock", "repro", "--single-item", *(["--force"] * force), stage]
        state: State | None = None

        def read(line: str) -> None:
            nonlocal state
            state = state or _state(stage, line)
            if emit is not None:
                emit(line)

        code, tail = self._run(stage, command, timeout, read)
        if code != 0:
            raise _failure(stage, code, tail)
        # A stage counts as skipped or cached only if DVC says so.
        return Outcome(stage, state or State.RAN, time.monotonic() - start)

    def call(
        self,
        name: str,
        arguments: Sequence[str],
        *,
        timeout: float | None = None,
        emit: Emit | None = None,
    ) -> None:
        """Any other dvc command, `name` in messages. Raises as `repro` does."""
        code, tail = self._run(name, arguments, timeout, emit)
        if code != 0:
            raise _failure(name, code, tail)

    def stop(self) -> None:
        """End every running stage and let none begin; returns when all are gone."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        ending = [threading.Thread(target=self._end, args=(process,)) for process in running]
        for thread in ending:
            thread.start()
        for thread in ending:
            thread.join()

    def _run(
        self, name: str, arguments: Sequence[str], timeout: float | None, emit: Emit | None
    ) -> tuple[int, list[str]]:
        """The exit code and last lines of one dvc command."""
        with self._lock:
            if self._stopped:
                raise Stopped(f"{name}: not begun, the flow is ending")
            process = guard.spawn(
                [sys.executable, "-m", "dvc", *arguments],
                cwd=self.root,
                env=environment(),
                grace=self.grace,
            )
            self._running.add(process)
        late = threading.Event()

        def end_late() -> None:
            late.set()
            self._end(process)

        # A timer, since this thread may sit in a read for as long as the stage is silent.
        timer = threading.Timer(timeout or 0, end_late)
        timer.daemon = True
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        try:
            if timeout is not None:
                timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                line = line.rstrip()[:MAX_LINE]
                tail.append(line)
                if emit is not None:
                    emit(line)
            code = process.wait()
        finally:  # whatever was raised: nothing of the command outlives this call
            timer.cancel()
            self._end(process)
            if process.stdout is not None:
                process.stdout.close()
            with self._lock:
                self._running.discard(process)
        if code != 0 and self._stopped:
            raise Stopped(f"{name}: ended with the flow")
        if late.is_set():
            raise StageTimeout(f"{name}: ended after {timeout:g} s\n{_shown(tail)}")
        return code, list(tail)

    def _end(self, process: subprocess.Popen[str]) -> None:
        guard.stop(process, patience=2 * self.grace + 5)


def environment() -> dict[str, str]:
    """What dvc and its stages run in: this environment's `python` first, output unbuffered."""
    binaries = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != binaries:
        path = binaries + os.pathsep + path
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "DVC_NO_ANALYTICS": "1"}


def _state(stage: str, line: str) -> State | None:
    for pattern, state in _MESSAGES:
        match = pattern.match(line)
        if match and match["stage"] == stage:
            return state
    return None


def _failure(name: str, code: int, lines: Sequence[str]) -> DvcError:
    """The exception that a failed command stands for, `code` being dvc's own."""
    exits = [int(match[1]) for line in lines if (match := _EXIT.search(line))]
    stage_code = exits[-1] if exits else None
    # DVC reports signal n as -n, a shell and the guard as 128 + n.
    final = code if stage_code is None else stage_code
    number = -final if final < 0 else final - 128
    if number > 0 and final != 255:
        return StageInterrupted(f"{name}: ended by signal {number}\n{_shown(lines)}")
    if stage_code is not None:
        return StageFailed(f"{name}: failed with exit code {stage_code}\n{_shown(lines)}")
    if any(_BUSY.search(line) for line in lines):
        return StageInterrupted(f"{name}: another dvc is at work here\n{_shown(lines)}")
    return StageFailed(f"{name}: dvc failed\n{_shown(lines)}")


def _shown(lines: Iterable[str]) -> str:
    return "\n".join(line for line in lines if line)


def _sentence(error: BaseException) -> str:
    """An exception of DVC's with its causes: the outer one alone often says only where."""
    parts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        with contextlib.suppress(Exception):
            if str(cause) and str(cause) not in parts:
                parts.append(str(cause))
        cause = cause.__cause__
    return ": ".join(parts)
