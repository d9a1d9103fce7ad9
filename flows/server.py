"""Prefect's server for as long as a `with` block, on loopback, under guard.

Prefect would start a temporary one by itself, but gives up after 20 s on a busy machine and
leaves it running when the flow is killed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows import guard

HOST = "127.0.0.1"
PATIENCE_SECONDS = 600.0  # ten seconds if nothing else runs


class ServerError(Exception):
    """The server did not come up; the message says why."""


def free_port(first: int = 0) -> int:
    """The first free port of `first`, `first` + 1, ...; any free one if `first` is 0.

    Raises ServerError if none of a hundred is free.
    """
    for port in range(first, min(first + 100, 65536)) if first else [0]:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ServerError(f"no free port from {first} on")


@contextmanager
def server(port: int, *, ui: bool, patience: float = PATIENCE_SECONDS) -> Iterator[str]:
    """Start a server and wait until it is healthy; yields the address of its API.

    Its log is server.log in PREFECT_HOME. Raises ServerError with that log's last lines.
    """
    address = f"http://{HOST}:{port}/api"
    log = Path(os.environ["PREFECT_HOME"]) / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    flags = ["--host", HOST, "--port", str(port), "--analytics-off", *(["--no-ui"] * (not ui))]
    with log.open("wb") as output:
        process = guard.spawn(
            [sys.executable, "-m", "prefect", "--no-prompt", "server", "start", *flags],
            env={**os.environ, "PREFECT_API_URL": address, "NO_COLOR": "1"},
            output=output,
        )
    try:
        _wait_until_healthy(process, address, log, patience)
        yield address
    finally:
        guard.stop(process, patience=15)


def _wait_until_healthy(
    process: subprocess.Popen[str], address: str, log: Path, patience: float
) -> None:
    deadline = time.monotonic() + patience
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            what = "ended" if process.poll() is not None else f"is silent after {patience:g} s"
            raise ServerError(f"Prefect's server {what}; the end of {log}:\n{last}")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.1)
