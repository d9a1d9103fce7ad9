"""Prefect's page on loopback, with the pipeline served: runs can be started there, watched and
cancelled; a nightly schedule is there too, paused until it is switched on.

Ctrl-C ends the server, the served pipeline and whatever is running. PORT chooses the port.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flows import ROOT, guard
from flows.server import HOST, ServerError, free_port, server

DEPLOYMENT = "local"
NIGHTLY = "0 3 * * *"
FIRST_PORT = 4200
RUNNER_GRACE_SECONDS = 15.0  # time to report cancelled runs while the server still listens
CODE = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM, then 0; 1 if something did not start."""
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description=__doc__)
    parser.add_argument(
        "--no-server",
        action="store_true",
        help="serve the pipeline to the server that PREFECT_API_URL names",
    )
    arguments = parser.parse_args(argv)
    if arguments.no_server:
        return serve_pipeline()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.default_int_handler)
    try:
        port = chosen_port(os.environ.get("PORT"))
        print("ui: starting Prefect's server", flush=True)
        with (
            server(port, ui=True) as api,
            report_server(port + 1) as report,
            runner(api, report) as process,
        ):
            schedule = wait_until_served(api, process)
            print(f"ui: http://{HOST}:{port}/deployments (Quick run starts the pipeline)")
            print(f"ui: nightly schedule ({NIGHTLY}): {schedule}", flush=True)
            print("ui: Ctrl-C ends it", flush=True)
            process.wait()
            raise ServerError(f"the served pipeline ended with code {process.returncode}")
    except KeyboardInterrupt:
        print("\nui: ended", flush=True)
        return 0
    except ServerError as error:
        print(f"ui: error: {error}", file=sys.stderr)
        return 1


def chosen_port(wanted: str | None) -> int:
    """The port asked for, which must be free, else the first free one from 4200 on."""
    if not wanted:
        return free_port(FIRST_PORT)
    if not wanted.isdecimal() or not 0 < int(wanted) < 65536:
        raise ServerError(f"PORT={wanted}: a number from 1 to 65535 is needed")
    if free_port(int(wanted)) != int(wanted):
        raise ServerError(f"PORT={wanted}: in use; choose another or leave PORT out")
    return int(wanted)


def serve_pipeline() -> int:
    """Serve the flow to the server of PREFECT_API_URL until told to end."""
    from prefect.deployments.runner import EntrypointType
    from prefect.schedules import Cron

    from flows.pipeline import pipeline

    pipeline.serve(
        name=DEPLOYMENT,
        schedules=[Cron(NIGHTLY, active=False)],
        paused=False,  # the deployment; its schedule is what waits to be switched on
        pause_on_shutdown=False,
        limit=1,
        global_limit=1,  # one checkout, one run
        print_starting_message=False,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    return 0


@contextmanager
def runner(api: str, report: str) -> Iterator[subprocess.Popen[str]]:
    """`serve_pipeline` in a guarded process; its log is runner.log in PREFECT_HOME.

    Runs that a killed server left as running are closed first, or they would keep the next one
    waiting; runs under way at the end are cancelled and waited for.
    """
    for run in unfinished_runs(api):
        set_state(api, run, "CRASHED", "the server that ran it was killed")
    log = Path(os.environ["PREFECT_HOME"]) / "runner.log"
    search = os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))
    with log.open("wb") as output:
        process = guard.spawn(
            [sys.executable, "-m", "flows.serve", "--no-server"],
            cwd=ROOT,
            env={
                **os.environ,
                "PREFECT_API_URL": api,
                "PIPELINE_ROOT": str(ROOT),
                "PIPELINE_REPORT_URL": report,
                "PYTHONPATH": search,
            },
            output=output,
            grace=RUNNER_GRACE_SECONDS,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            cancel_runs(api)
        guard.stop(process, patience=RUNNER_GRACE_SECONDS + 10)


@contextmanager
def report_server(first_port: int) -> Iterator[str]:
    """The folder report/ over HTTP on loopback, so that the page can link to the report."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(ROOT / "report"))
    with http.server.ThreadingHTTPServer((HOST, free_port(first_port)), handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        try:
            yield f"http://{HOST}:{listening.server_port}/index.html"
        finally:
            listening.shutdown()


def request(address: str, body: Mapping[str, object] | None = None) -> Any:
    """The answer of Prefect's API to a GET, or to a POST of `body`."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        return json.load(answer)


def unfinished_runs(api: str) -> list[str]:
    """The ids of the served pipeline's runs that have begun and not ended."""
    wanted = {
        "deployments": {"name": {"any_": [DEPLOYMENT]}},
        "flows": {"name": {"any_": ["pipeline"]}},
        "flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}},
    }
    return [run["id"] for run in request(f"{api}/flow_runs/filter", wanted)]


def set_state(api: str, run: str, state: str, message: str | None = None) -> None:
    """Propose a state, such as CANCELLING, for a flow run."""
    body = {"state": {"type": state, "name": state.capitalize(), "message": message}}
    request(f"{api}/flow_runs/{run}/set_state", body)


def cancel_runs(api: str, patience: float = RUNNER_GRACE_SECONDS) -> None:
    """Cancel what runs and wait until it has ended, so that no run is left as running."""
    with suppress(OSError):  # a server that is gone needs no message
        for run in unfinished_runs(api):
            set_state(api, run, "CANCELLING")
        deadline = time.monotonic() + patience
        while unfinished_runs(api) and time.monotonic() < deadline:
            time.sleep(0.2)


def wait_until_served(api: str, process: subprocess.Popen[str], patience: float = 120.0) -> str:
    """Wait for the deployment to be registered; its schedule as the server has it: `paused` or
    `active`. Raises ServerError if the runner ends first."""
    deadline = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError):
            deployment = request(f"{api}/deployments/name/pipeline/{DEPLOYMENT}")
            if deployment["status"] == "READY":
                active = any(schedule["active"] for schedule in deployment["schedules"])
                return "active" if active and not deployment["paused"] else "paused"
        time.sleep(0.2)
    log = Path(os.environ["PREFECT_HOME"]) / "runner.log"
    last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise ServerError(f"the pipeline could not be served; the end of {log}:\n{last}")


if __name__ == "__main__":
    sys.exit(main())
