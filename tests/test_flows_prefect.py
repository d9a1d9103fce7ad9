"""The flows inside Prefect, on one temporary server: states, retries, cancellation, schedules."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import dvc, pipeline, serve, sweep
from flows.server import ServerError, free_port, server

# isort: split
from prefect.client.schemas.objects import State
from prefect.deployments.runner import RunnerDeployment
from prefect.schedules import Cron
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed

ROOT = Path(__file__).parent.parent
STAGES = """
stages:
  one:
    cmd: echo 1 > one.txt
    outs: [one.txt]
  broken:
    cmd: cat one.txt; echo row 3 has no answer; exit 2
    deps: [one.txt]
    outs: [broken.txt]
  after:
    cmd: cat broken.txt > after.txt
    deps: [broken.txt]
    outs: [after.txt]
"""


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own for this module, its scheduler included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        with (
            server(free_port(), ui=False) as address,
            temporary_settings({PREFECT_API_URL: address}),
        ):
            yield address


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_bytes((ROOT / ".dvc" / "config").read_bytes())
    (tmp_path / "dvc.yaml").write_text(STAGES)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for module in (pipeline, sweep):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def test_a_failed_stage_ends_the_flow_with_its_words(api: str, checkout: Path) -> None:
    state = pipeline.pipeline(return_state=True)
    assert state.is_failed()
    assert "broken: failed with exit code 2" in str(state.message)
    assert "row 3 has no answer" in str(state.message)
    [run] = serve.request(f"{api}/flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1})
    wanted = {"flow_runs": {"id": {"any_": [run["id"]]}}}
    tasks = serve.request(f"{api}/task_runs/filter", wanted)
    assert {task["name"]: task["state_name"] for task in tasks} == {
        "one": "Ran",
        "broken": "Failed",
        "after": "NotReady",
    }
    assert {task["name"]: task["run_count"] for task in tasks}["broken"] == 1  # not tried again
    assert not (checkout / "after.txt").exists()


def test_states_carry_dvcs_words_and_upstream_is_not_run_again(api: str, checkout: Path) -> None:
    project = dvc.Project(checkout)
    project.repro("one")
    state = pipeline.pipeline(targets=["one"], return_state=True)
    assert state.is_completed()
    assert [(o.stage, o.state) for o in state.result()] == [("one", dvc.State.SKIPPED)]
    state = pipeline.pipeline(targets=["one"], force=True, return_state=True)
    assert [o.state for o in state.result()] == [dvc.State.RAN]
    artifacts = serve.request(
        f"{api}/artifacts/filter", {"artifacts": {"key": {"any_": ["stages"]}}}
    )
    assert {row["state"] for a in artifacts for row in json.loads(a["data"])} >= {"Skipped", "Ran"}


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (dvc.StageInterrupted("x"), True),
        (dvc.StageFailed("x"), False),
        (dvc.StageTimeout("x"), False),
        (dvc.Stopped("x"), False),
        (RuntimeError("x"), False),
    ],
)
def test_only_the_machines_faults_are_tried_again(error: Exception, again: bool) -> None:
    condition = pipeline.run_stage.retry_condition_fn
    assert condition is not None
    assert condition(pipeline.run_stage, None, Failed(data=error)) is again  # type: ignore[arg-type]


def test_a_cron_deployment_gets_scheduled_runs(api: str) -> None:
    """With unfit versions of its dependencies Prefect schedules nothing and says nothing."""
    deployment = pipeline.pipeline.to_deployment(name="nightly", schedules=[Cron(serve.NIGHTLY)])
    assert isinstance(deployment, RunnerDeployment)
    identity = str(deployment.apply())
    wanted = {
        "deployments": {"id": {"any_": [identity]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    runs: list[dict[str, Any]] = []
    deadline = time.monotonic() + 90
    while not runs and time.monotonic() < deadline:
        time.sleep(0.2)
        runs = serve.request(f"{api}/flow_runs/filter", wanted)
    assert runs
    assert {run["expected_start_time"][11:16] for run in runs} == {"03:00"}


def test_the_served_schedule_is_paused_and_runs_can_be_closed(api: str) -> None:
    deployment = pipeline.pipeline.to_deployment(
        name=serve.DEPLOYMENT, schedules=[Cron(serve.NIGHTLY, active=False)], paused=False
    )
    assert isinstance(deployment, RunnerDeployment)
    identity = deployment.apply()
    there = serve.request(f"{api}/deployments/{identity}")
    assert [schedule["active"] for schedule in there["schedules"]] == [False]
    assert there["paused"] is False
    run = serve.request(f"{api}/deployments/{identity}/create_flow_run", {})["id"]
    assert serve.unfinished_runs(api) == []  # scheduled, not begun
    serve.set_state(api, run, "PENDING")
    assert serve.unfinished_runs(api) == [run]
    serve.set_state(api, run, "CRASHED", "the server that ran it was killed")
    assert serve.unfinished_runs(api) == []
    assert serve.request(f"{api}/flow_runs/{run}")["state"]["type"] == "CRASHED"


# --- plain functions -------------------------------------------------------------------------


def test_accuracy_table() -> None:
    row = {"n": 512, "accuracy": 0.3, "ci_low": 0.26, "ci_high": 0.34}
    difference = {"diff": 0.5, "ci_low": 0.451, "ci_high": 0.55}
    assert pipeline.accuracy_table({"base": row, "online_minus_base": difference}) == (
        "| model | n | accuracy | interval |\n|---|---:|---:|---|\n"
        "| base | 512 | 30.0% | 26.0% to 34.0% |\n\n"
        "online minus base: +50.0 points (interval +45.1 to +55.0)"
    )


def test_stage_rows() -> None:
    ran: State[dvc.Outcome] = Completed(name="Ran", data=dvc.Outcome("one", dvc.State.RAN, 1.234))
    assert pipeline.stage_rows({"one": ran, "two": Failed()}) == [
        {"stage": "one", "state": "Ran", "seconds": 1.23},
        {"stage": "two", "state": "Failed", "seconds": None},
    ]


def test_free_port_passes_over_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) > port
        with pytest.raises(ServerError, match=f"PORT={port}: in use"):
            serve.chosen_port(str(port))


@pytest.mark.parametrize("port", ["x", "0", "65536", "-1"])
def test_impossible_port(port: str) -> None:
    with pytest.raises(ServerError, match="a number from 1 to 65535"):
        serve.chosen_port(port)


def test_experiments_are_methods_by_seeds() -> None:
    chosen = sweep.experiments(["grpo", "gtpo", "grpo"], [1, 2], ["train_online.rounds=3"])
    assert [e.name for e in chosen] == [
        "sweep-grpo-1",
        "sweep-grpo-2",
        "sweep-gtpo-1",
        "sweep-gtpo-2",
    ]
    assert chosen[2].settings == (
        "method.name=gtpo",
        "train_online.seed=1",
        "train_online.rounds=3",
    )
    with pytest.raises(sweep.SweepError, match="letters, digits"):
        sweep.experiments(["a b"], [1])


def test_a_sweep_compares_methods_without_what_params_take_from_others(checkout: Path) -> None:
    (checkout / "params.yaml").write_text("method: {name: gtpo, weighting: seed_grpo, loss: dapo}")
    assert sweep.choices() == ["weighting", "loss"]
    [plain] = sweep.experiments(["grpo"], [1], choices=sweep.choices())
    assert plain.settings[:3] == ("method.name=grpo", "method.weighting=null", "method.loss=null")
    kept = "method.weighting=seed_grpo"
    [modulated] = sweep.experiments(["grpo"], [1], [kept], choices=sweep.choices())
    assert modulated.settings[1] == "method.loss=null"
    assert modulated.settings[-1] == kept
    from dvc.utils.hydra import apply_overrides  # as `dvc exp run -S` does

    apply_overrides(checkout / "params.yaml", list(plain.settings[:3]))
    method = yaml.safe_load((checkout / "params.yaml").read_text())["method"]
    assert method == {"name": "grpo", "weighting": None, "loss": None}


def test_sweep_needs_a_commit_and_says_what_is_uncommitted(checkout: Path) -> None:
    chosen = sweep.experiments(["grpo"], [1])
    with pytest.raises(sweep.SweepError, match="git add and commit first"):
        sweep.check(chosen, replace=False)
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "add", "-A"], cwd=checkout, check=True)
    subprocess.run(["git", *identity, "commit", "-qm", "first"], cwd=checkout, check=True)
    assert sweep.check(chosen, replace=False) is None
    with (checkout / "dvc.yaml").open("a") as file:
        file.write("# changed\n")
    note = sweep.check(chosen, replace=False)
    assert note == "uncommitted changes take part in every experiment: dvc.yaml"
    there = ["git", "update-ref", "refs/exps/12/34/sweep-grpo-1", "HEAD"]
    subprocess.run(there, cwd=checkout, check=True)
    with pytest.raises(sweep.SweepError, match="sweep-grpo-1: there already"):
        sweep.check(chosen, replace=False)


def test_table_of_metrics() -> None:
    rows: dict[str, dict[str, float]] = {
        "a-1": {"online.accuracy": 0.81234, "n": 5},
        "b-1": {"n": 5},
    }
    assert sweep.table(rows) == "experiment  online.accuracy\na-1         0.8123\nb-1         -"
    assert sweep.table(rows, ["absent"]).splitlines()[0].split() == [
        "experiment",
        "n",
        "online.accuracy",
    ]


def test_work_pool_deployment_names_no_path_and_is_paused() -> None:
    definition = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    [step] = definition["pull"]
    assert step == {
        "prefect.deployments.steps.set_working_directory": {"directory": "{{ $PIPELINE_ROOT }}"}
    }
    [deployment] = definition["deployments"]
    assert deployment["entrypoint"] == "flows/pipeline.py:pipeline"
    assert [schedule["active"] for schedule in deployment["schedules"]] == [False]
    assert deployment["concurrency_limit"] == 1
