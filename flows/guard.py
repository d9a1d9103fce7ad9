"""One command under guard: nothing of it outlives whoever asked for it.

DVC starts a stage through a shell, the stage starts workers; killing any one of them leaves the
others as orphans. So each command runs below a small process of its own, the guard, which ends
all descendants (SIGTERM, then SIGKILL after a grace) when the command ends, when it is told to,
or when the pipe to its caller closes, as it does even after a `kill -9` of the caller. On Linux
the guard adopts orphans, so a descendant in a session of its own is found as well.

The guard runs this file by itself, without site-packages: standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

GRACE_SECONDS = 5.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_POLL_SECONDS = 0.02


def spawn(
    command: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    output: int | IO[bytes] = subprocess.PIPE,
    grace: float = GRACE_SECONDS,
) -> subprocess.Popen[str]:
    """Start `command` under a guard; stdout and stderr together go to `output`.

    The result is the guard: it exits with the command's code (128 + n after signal n) once every
    descendant is gone. `grace`: seconds between SIGTERM and SIGKILL.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(grace), *command],
        cwd=cwd,
        env=env,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )


def stop(process: subprocess.Popen[str], patience: float = 2 * GRACE_SECONDS) -> None:
    """End a guarded command and all its descendants; returns when they are gone."""
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(argv: Sequence[str]) -> int:
    """`guard.py GRACE COMMAND...`: the guard itself; standard input is the pipe to the caller."""
    grace, command = float(argv[0]), list(argv[1:])
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    told: list[int] = []
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, lambda number, _: told.append(number))
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    codes: dict[int, int] = {}
    while child.pid not in codes and not told:
        ready, _, _ = select.select([0, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
        if 0 in ready and not os.read(0, 4096):
            told.append(signal.SIGTERM)
        codes |= _reap()
    codes |= _end_all(child.pid, grace)
    code = codes.get(child.pid, 128 + signal.SIGKILL)
    return code if code >= 0 else 128 - code


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _reap() -> dict[int, int]:
    """The exit codes of the children that have ended, by pid (negative: the signal)."""
    codes = {}
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    return codes


def _end_all(group: int, grace: float) -> dict[int, int]:
    """SIGTERM, later SIGKILL, to the command's group and to every child this process has or
    adopts, until none is left."""
    codes: dict[int, int] = {}
    asked: set[int] = set()
    deadline = time.monotonic() + grace
    _signal(group, signal.SIGTERM, to_group=True)
    while True:
        codes |= _reap()
        children = set(_children())
        if not children:
            return codes
        if time.monotonic() > deadline:
            _signal(group, signal.SIGKILL, to_group=True)
            for pid in children:
                _signal(pid, signal.SIGKILL)
        else:
            for pid in children - asked - {group}:
                _signal(pid, signal.SIGTERM)
            asked |= children
        time.sleep(_POLL_SECONDS)


def _signal(pid: int, number: int, to_group: bool = False) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        (os.killpg if to_group else os.kill)(pid, number)


def _children() -> Iterator[int]:
    """This process's children, adopted ones included."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                yield int(stat.parent.name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
