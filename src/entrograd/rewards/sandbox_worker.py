"""A worker of the sandbox: the process that answers requests, within its limits.

It reads and writes JSON lines and ends with its parent. The work is done by a fork of it: one that
is killed is replaced in milliseconds, with no new imports.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import IO, Literal, TypedDict, TypeVar

from entrograd.pipeline.parent import end_with_parent

WALL = 10.0  # times the limit of processor time: what a request may take on a crowded machine
READY = "ready"

R = TypeVar("R")  # a request, as the module that calls `serve` defines it


class Reply(TypedDict):
    """What became of a request, as sandbox.Outcome has it."""

    kind: Literal["done", "timeout", "error"]
    value: object


def say(stream: IO[bytes], message: object) -> None:
    """Write a message as a line of JSON."""
    stream.write(json.dumps(message).encode("ascii") + b"\n")
    stream.flush()


def serve(handle: Callable[[R], object], prepare: Callable[[], object]) -> None:
    """The life of a worker: `prepare`, say so, then answer requests until the pipe closes.

    Command line: the limits, in MiB of address space and in seconds of processor time. `handle`
    runs in a fork; one that raises, dies or takes too long is ended, the next request gets another.
    """
    memory_mb, seconds = int(sys.argv[1]), float(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)  # what a library prints is no reply
        prepare()
        say(replies, READY)
        fork: _Fork | None = None
        for line in sys.stdin.buffer:
            # What requests leave behind may not decide: a fork that was not used has the last word.
            for used in (True, False) if fork else (False,):
                fork = fork or _Fork(handle, memory_mb, seconds, replies)
                reply = fork.ask(line, WALL * seconds)
                if reply["kind"] != "done":
                    fork.kill()
                    fork = None
                if reply["kind"] != "error" or not used:
                    break
            say(replies, reply)


class _Fork:
    """A copy of the worker that does the work; all it shares with the worker is a socket."""

    def __init__(
        self, handle: Callable[[R], object], memory_mb: int, seconds: float, replies: IO[bytes]
    ) -> None:
        self._socket, theirs = socket.socketpair()
        self._pid: int | None = os.fork()
        if self._pid == 0:
            try:
                os.close(replies.fileno())
                self._socket.close()
                end_with_parent()
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
                _work(handle, seconds, theirs)
            finally:
                os._exit(1)
        theirs.close()

    def ask(self, line: bytes, wall_seconds: float) -> Reply:
        """The reply, or what became of the request."""
        deadline, reply = time.monotonic() + wall_seconds, b""
        try:
            self._socket.settimeout(wall_seconds)
            self._socket.sendall(line)
            while not reply.endswith(b"\n"):
                self._socket.settimeout(max(1e-3, deadline - time.monotonic()))
                part = self._socket.recv(1 << 16)
                if not part:
                    return self._died()
                reply += part
        except TimeoutError:
            return {"kind": "timeout", "value": None}
        except OSError:
            return self._died()
        found: Reply = json.loads(reply)
        return found

    def kill(self) -> None:
        """End it, whatever it is doing."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        self._socket.close()

    def _died(self) -> Reply:
        assert self._pid is not None
        _, status = os.waitpid(self._pid, 0)
        self._pid = None
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
            return {"kind": "timeout", "value": None}
        return {"kind": "error", "value": "Died"}


def _work(handle: Callable[[R], object], seconds: float, connection: socket.socket) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process; no code can catch it
    with connection.makefile("rb") as requests, connection.makefile("wb") as replies:
        for line in requests:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            reply: Reply
            try:
                reply = {"kind": "done", "value": handle(json.loads(line))}
            except Exception as error:  # reported by name; the worker then ends this process
                reply = {"kind": "error", "value": type(error).__name__}
            signal.setitimer(signal.ITIMER_PROF, 0)
            say(replies, reply)
