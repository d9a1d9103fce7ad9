"""The DVC pipeline as a Prefect flow: one task per stage, in the order of DVC's graph.

DVC decides whether a stage runs, is taken from its cache or is up to date; the task's state says
which. Prefect adds retries of the machine's faults, timeouts, cancellation, logs and artifacts.

`python -m flows.pipeline` runs it without a server (or with the one PREFECT_API_URL names).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows import ROOT, dvc
from flows.server import ServerError, free_port, server

# isort: split
from prefect import flow, get_run_logger, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.events.worker import EventsWorker
from prefect.futures import PrefectFuture
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import Task

STAGE_TIMEOUT_MINUTES = 240.0
SUMMARY = Path("results/summary.json")
REPORT = Path("report/index.html")
RUNNER: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=2)


def worth_a_retry(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Only the machine's faults are tried again: a signal, a lock held by another dvc."""
    try:
        state.result()
    except dvc.StageInterrupted:
        return True
    except Exception:
        return False
    return False


@task(
    name="stage",
    task_run_name="{stage}",
    cache_policy=NO_CACHE,  # DVC knows; Prefect must not answer in its place
    persist_result=False,
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=worth_a_retry,
    log_prints=False,
)
def run_stage(project: dvc.Project, stage: str, force: bool, timeout: float) -> State[dvc.Outcome]:
    """One stage through DVC; the state's name is Ran, Cached or Skipped."""
    log = get_run_logger()
    outcome = project.repro(stage, force=force, timeout=timeout, emit=log.info)
    log.info(outcome_line(outcome), extra={"outcome": True})
    return Completed(name=str(outcome.state), message=f"{outcome.seconds:.1f} s", data=outcome)


@flow(
    name="pipeline",
    task_runner=RUNNER,
    persist_result=False,
    validate_parameters=True,
)
def pipeline(
    targets: list[str] | None = None,
    force: bool = False,
    stage_timeout_minutes: float = STAGE_TIMEOUT_MINUTES,
) -> list[dvc.Outcome]:
    """Bring the pipeline up to date, as `dvc repro` does.

    Args:
        targets: stages to bring up to date with everything they need; all if empty.
        force: run every one of them, changed or not.
        stage_timeout_minutes: a stage that takes longer is ended and fails.
    """
    project = dvc.Project(ROOT)
    graph = project.graph(targets or ())
    futures: dict[str, PrefectFuture[Any]] = {}
    try:
        for stage, upstream in graph.items():
            futures[stage] = run_stage.submit(
                project=project,
                stage=stage,
                force=force,
                timeout=60 * stage_timeout_minutes,
                wait_for=[futures[name] for name in upstream],
                return_state=False,
            )
        for future in futures.values():
            future.wait()
    except BaseException:  # cancelled, interrupted: the stages' threads do not hear of it
        project.stop()
        raise
    states = {stage: future.state for stage, future in futures.items()}
    publish(states)
    for state in states.values():
        if state.is_failed() or state.is_crashed():
            state.result()  # raises what the stage raised
    return [state.result() for state in states.values()]


def publish(states: Mapping[str, State[dvc.Outcome]]) -> None:
    """Artifacts of a run: what happened to each stage, the accuracies, where the report is."""
    create_table_artifact(key="stages", table=stage_rows(states), description="Stages")
    if (ROOT / SUMMARY).exists():
        summary = json.loads((ROOT / SUMMARY).read_text(encoding="utf-8"))
        create_markdown_artifact(
            key="accuracy", markdown=accuracy_table(summary), description="Accuracy"
        )
    if (ROOT / REPORT).exists():
        # A browser opens no file from a page that came over HTTP, so `make ui` serves the folder.
        link = os.environ.get("PIPELINE_REPORT_URL") or (ROOT / REPORT).as_uri()
        create_link_artifact(key="report", link=link, link_text="report", description="Report")


def stage_rows(states: Mapping[str, State[dvc.Outcome]]) -> list[dict[str, str | float | None]]:
    """One row per stage: name, state, seconds (None if it did not succeed)."""
    rows: list[dict[str, str | float | None]] = []
    for stage, state in states.items():
        seconds = round(state.result().seconds, 2) if state.is_completed() else None
        rows.append({"stage": stage, "state": state.name, "seconds": seconds})
    return rows


def accuracy_table(summary: Mapping[str, object]) -> str:
    """results/summary.json as Markdown: accuracies with their intervals, then the difference."""
    lines = ["| model | n | accuracy | interval |", "|---|---:|---:|---|"]
    for name, row in summary.items():
        if isinstance(row, Mapping) and "accuracy" in row:
            interval = f"{row['ci_low']:.1%} to {row['ci_high']:.1%}"
            lines.append(f"| {name} | {row['n']} | {row['accuracy']:.1%} | {interval} |")
    for name, row in summary.items():
        if isinstance(row, Mapping) and "diff" in row:
            points = (100 * row[key] for key in ("diff", "ci_low", "ci_high"))
            lines.append(
                "\n{}: {:+.1f} points (interval {:+.1f} to {:+.1f})".format(
                    name.replace("_", " "), *points
                )
            )
    return "\n".join(lines)


def outcome_line(outcome: dvc.Outcome) -> str:
    """What a run prints for a stage."""
    return f"{outcome.stage:<16} {outcome.state.lower():<8} {outcome.seconds:7.1f} s"


# --- the command -----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the flow, one line per stage; 0, 1 if a stage failed, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m flows.pipeline", description=__doc__)
    parser.add_argument(
        "--stage",
        nargs="+",
        default=[],
        metavar="NAME",
        help="only these stages and what they need (default: all)",
    )
    parser.add_argument("--force", action="store_true", help="run them even if unchanged")
    parser.add_argument(
        "--stage-timeout-minutes", type=float, default=STAGE_TIMEOUT_MINUTES, metavar="N"
    )
    parser.add_argument("--verbose", action="store_true", help="show the stages' own output")
    arguments = parser.parse_args(argv)
    quiet(arguments.verbose)
    try:
        dvc.Project(ROOT).graph(arguments.stage)  # a wrong name needs no server to be found
        with any_server():
            pipeline(arguments.stage, arguments.force, arguments.stage_timeout_minutes)
    except dvc.UnknownStage as error:
        print(f"pipeline: error: {error}", file=sys.stderr)
        return 2
    except (dvc.DvcError, ServerError) as error:
        print(f"pipeline: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("pipeline: interrupted; no stage is left running", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def any_server() -> Iterator[None]:
    """The server that PREFECT_API_URL names, or one for the duration of the block."""
    if PREFECT_API_URL.value():
        yield
        return
    with server(free_port(), ui=False) as address, temporary_settings({PREFECT_API_URL: address}):
        try:
            yield
        finally:  # both are sent in the background, to a server that is about to go
            APILogHandler().flush()
            EventsWorker.drain_all(timeout=10)


def quiet(verbose: bool) -> None:
    """Show only warnings of Prefect's log, and none of a run's own: this command says those."""

    def shown(record: logging.LogRecord) -> bool:
        run = record.name.startswith(("prefect.task_runs", "prefect.flow_runs"))
        return record.levelno >= logging.WARNING and not run

    for handler in logging.getLogger().handlers:
        handler.addFilter(shown)
    lines = logging.StreamHandler(sys.stdout)
    lines.setFormatter(logging.Formatter("%(message)s"))
    lines.addFilter(lambda record: record.levelno == logging.INFO)
    lines.addFilter(lambda record: verbose or hasattr(record, "outcome"))
    logging.getLogger("prefect.task_runs").addHandler(lines)


if __name__ == "__main__":
    sys.exit(main())
