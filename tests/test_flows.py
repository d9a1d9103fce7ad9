"""The flows over a throwaway DVC project of shell commands: order, states, failures, and that no
process outlives its flow."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import yaml

from flows import dvc, guard

ROOT = Path(__file__).parent.parent
DIAMOND = """
stages:
  base:
    cmd: cat seed.txt > base.txt
    deps: [seed.txt]
    outs: [base.txt]
  left:
    cmd: (cat base.txt; echo left) > left.txt
    deps: [base.txt]
    outs: [left.txt]
  right:
    cmd: (cat base.txt; echo right ${n}) > right.txt
    params: [n]
    deps: [base.txt]
    outs: [right.txt]
  join:
    cmd: cat left.txt right.txt > join.txt
    deps: [left.txt, right.txt]
    outs: [join.txt]
"""
OTHERS = """
  broken:
    cmd: echo row 3 has no answer; exit 2
    outs: [broken.txt]
  killed:
    cmd: kill -9 $$
    outs: [killed.txt]
  each:
    matrix:
      method: [grpo, gtpo]
    cmd: echo ${item.method} > ${item.method}.txt
    outs: ['${item.method}.txt']
  stubborn:
    cmd: >-
      trap '' TERM; (setsid sleep 600 & echo $! >> pids); sleep 600 & echo $! >> pids;
      echo $$ >> pids; echo begun; wait; sleep 600
    outs: [stubborn.txt]
"""


def command(*arguments: str, cwd: Path) -> None:
    subprocess.run(arguments, cwd=cwd, check=True, capture_output=True, env=dvc.environment())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with the diamond and some difficult stages beside it."""
    folder = tmp_path / "checkout"
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc" / "config").write_bytes((ROOT / ".dvc" / "config").read_bytes())
    (folder / "dvc.yaml").write_text(DIAMOND + OTHERS)
    (folder / "params.yaml").write_text("n: 1\n")
    (folder / "seed.txt").write_text("0\n")
    command("git", "init", "-q", cwd=folder)
    return folder


@pytest.fixture
def project(root: Path) -> dvc.Project:
    return dvc.Project(root, grace=0.3)


def processes() -> dict[int, int]:
    """Every process with its parent, unburied ones aside."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    return parents


def living(pids: Iterable[int]) -> list[int]:
    return sorted(set(pids) & set(processes()))


def below(ancestor: int) -> set[int]:
    """All descendants of a process."""
    parents = processes()
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {ancestor}


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for a condition; a test that waits in vain fails."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def stubborn_pids(root: Path) -> list[int]:
    """The processes of stage `stubborn`: a shell that ignores SIGTERM, a child of it, and one in
    a session of its own."""
    path = root / "pids"
    pids = [int(line) for line in path.read_text().split()] if path.exists() else []
    return pids if len(pids) == 3 else []


# --- the graph -------------------------------------------------------------------------------


def test_graph_lists_upstream_first(project: dvc.Project) -> None:
    graph = project.graph(["join"])
    order = list(graph)
    assert order.index("base") == 0
    assert order.index("join") == 3
    assert graph == {
        "base": (),
        "left": ("base",),
        "right": ("base",),
        "join": ("left", "right"),
    }


def test_graph_of_a_target_holds_what_it_needs_and_no_more(project: dvc.Project) -> None:
    assert project.graph(["left"]) == {"base": (), "left": ("base",)}


def test_graph_expands_a_matrix(project: dvc.Project) -> None:
    assert set(project.graph()) >= {"each@grpo", "each@gtpo", "base", "join", "broken"}


def test_unknown_stage_is_named(project: dvc.Project) -> None:
    with pytest.raises(dvc.UnknownStage, match="no stage 'rolout'; known: base, broken"):
        project.graph(["rolout"])


def test_a_folder_without_dvc_is_named(tmp_path: Path) -> None:
    with pytest.raises(dvc.UnknownStage, match=f"{tmp_path}.*not inside of a DVC repository"):
        dvc.Project(tmp_path).graph()


# --- states ----------------------------------------------------------------------------------


def test_ran_skipped_cached(project: dvc.Project, root: Path) -> None:
    lines: list[str] = []
    assert project.repro("base", emit=lines.append).state == dvc.State.RAN
    assert "> cat seed.txt > base.txt" in lines
    assert project.repro("base").state == dvc.State.SKIPPED
    (root / "base.txt").unlink()
    assert project.repro("base").state == dvc.State.CACHED
    assert (root / "base.txt").read_text() == "0\n"
    assert project.repro("base", force=True).state == dvc.State.RAN


def test_what_a_stage_prints_does_not_make_its_state(project: dvc.Project, root: Path) -> None:
    text = (root / "dvc.yaml").read_text()
    lie = "cmd: echo \"Stage 'base' didn't change, skipping\"; cat seed.txt > base.txt"
    (root / "dvc.yaml").write_text(text.replace("cmd: cat seed.txt > base.txt", lie))
    assert project.repro("base").state == dvc.State.RAN


# --- failures --------------------------------------------------------------------------------


def test_failure_has_the_exit_code_and_the_stages_words(project: dvc.Project) -> None:
    with pytest.raises(dvc.StageFailed, match=r"broken: failed with exit code 2\n") as caught:
        project.repro("broken")
    assert "row 3 has no answer" in str(caught.value)


def test_a_signal_is_the_machines_fault(project: dvc.Project) -> None:
    with pytest.raises(dvc.StageInterrupted, match="killed: ended by signal 9"):
        project.repro("killed")


@pytest.mark.parametrize(
    ("code", "line", "kind"),
    [
        (255, "ERROR: failed to reproduce 'x': failed to run: a, exited with 2", dvc.StageFailed),
        (255, "failed to run: a, exited with -9", dvc.StageInterrupted),
        (255, "failed to run: a, exited with 137", dvc.StageInterrupted),
        (137, "Running stage 'x':", dvc.StageInterrupted),
        (255, "ERROR: '/a' is busy, it is being blocked by:", dvc.StageInterrupted),
        (255, "ERROR: output 'a' does not exist", dvc.StageFailed),
        (1, "", dvc.StageFailed),
    ],
)
def test_kinds_of_failure(code: int, line: str, kind: type[dvc.DvcError]) -> None:
    assert type(dvc._failure("x", code, [line])) is kind


# --- nothing outlives the flow ---------------------------------------------------------------


def test_timeout_ends_every_process_of_a_silent_stage(
    project: dvc.Project, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    class WhenBegun(threading.Thread):
        """A timer that fires once the stage has begun, however long that takes."""

        def __init__(self, seconds: float, function: Callable[[], None]) -> None:
            super().__init__()
            asked.append(seconds)
            self.function = function

        def run(self) -> None:
            until(lambda: bool(stubborn_pids(root)))
            self.function()

        def cancel(self) -> None:
            pass

    monkeypatch.setattr(dvc.threading, "Timer", WhenBegun)
    with pytest.raises(dvc.StageTimeout, match=r"stubborn: ended after 0\.5 s"):
        project.repro("stubborn", timeout=0.5)
    assert asked == [0.5]
    assert len(stubborn_pids(root)) == 3
    assert living(stubborn_pids(root)) == []


def test_timeout_by_the_clock(project: dvc.Project) -> None:
    with pytest.raises(dvc.StageTimeout, match=r"base: ended after 0\.01 s"):
        project.repro("base", timeout=0.01)


def test_stop_ends_every_process_and_lets_none_begin(project: dvc.Project, root: Path) -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            project.repro("stubborn")
        except dvc.DvcError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: bool(stubborn_pids(root)))
    project.stop()
    assert living(stubborn_pids(root)) == []
    thread.join()
    assert [type(error) for error in raised] == [dvc.Stopped]
    with pytest.raises(dvc.Stopped, match="not begun"):
        project.repro("base")


def test_an_exception_in_the_callers_code_ends_the_stage(project: dvc.Project, root: Path) -> None:
    def interrupt(line: str) -> None:
        if line == "begun":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        project.repro("stubborn", emit=interrupt)
    assert len(stubborn_pids(root)) == 3
    assert living(stubborn_pids(root)) == []


def test_kill_9_of_the_flow_leaves_nothing(root: Path) -> None:
    script = "import sys; from pathlib import Path; from flows.dvc import Project; "
    script += "Project(Path(sys.argv[1]), grace=0.3).repro('stubborn')"
    flow = subprocess.Popen([sys.executable, "-c", script, str(root)], cwd=ROOT)
    until(lambda: bool(stubborn_pids(root)))
    descendants = below(flow.pid)
    assert set(stubborn_pids(root)) <= descendants
    flow.send_signal(signal.SIGKILL)
    flow.wait()
    until(lambda: not living(descendants), seconds=10)


def test_guard_returns_the_commands_code_and_ends_what_it_left_behind(tmp_path: Path) -> None:
    script = f"sleep 600 & echo $! > {tmp_path}/pid; exit 7"
    process = guard.spawn(["sh", "-c", script], grace=0.3)
    assert process.wait(30) == 7
    assert living([int((tmp_path / "pid").read_text())]) == []


def test_guard_names_a_command_that_is_not_there() -> None:
    process = guard.spawn(["no-such-command"])
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 127
    assert output == "no-such-command: No such file or directory\n"


# --- what the modules import -----------------------------------------------------------------


def test_flows_import_neither_torch_nor_entrograd() -> None:
    # The entrypoint as a worker loads it: its folder comes first on the path then.
    script = "from prefect.flows import load_flow_from_entrypoint as load; "
    script += "load('flows/pipeline.py:pipeline'); "
    script += "import flows.pipeline, flows.sweep, flows.serve, dvc.repo, sys; "
    script += "print([m for m in ('torch', 'entrograd') if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "[]"


def outputs(root: Path) -> dict[str, str]:
    """Hashes of the files and of each stage's entry in dvc.lock, whose order is that of running."""
    names = ("base.txt", "left.txt", "right.txt", "join.txt")
    files = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names}
    lock = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    return {**files, **{f"lock {name}": json.dumps(entry) for name, entry in lock.items()}}


def test_flow_without_a_server_equals_dvc_repro(root: Path) -> None:
    (root / "dvc.yaml").write_text(DIAMOND)
    (root / "results").mkdir()
    (root / "results" / "summary.json").write_text(json.dumps(SUMMARY))
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("PREFECT_API_URL", "PREFECT_HOME", "PIPELINE_ROOT")
    }
    run = subprocess.run(
        [sys.executable, "-m", "flows.pipeline"],
        cwd=root,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stderr == ""
    assert run.returncode == 0
    words = [line.split()[:2] for line in run.stdout.splitlines()]
    assert sorted(words) == sorted([name, "ran"] for name in ("base", "left", "right", "join"))
    assert words[0][0] == "base"
    assert words[-1][0] == "join"
    by_flow = outputs(root)
    assert (root / ".prefect").is_dir()
    for name in ("base.txt", "left.txt", "right.txt", "join.txt", "dvc.lock"):
        (root / name).unlink()
    command(sys.executable, "-m", "dvc", "repro", "--force", cwd=root)
    assert outputs(root) == by_flow


SUMMARY = {
    "base": {"n": 512, "accuracy": 0.3, "ci_low": 0.26, "ci_high": 0.34},
    "online": {"n": 512, "accuracy": 0.8, "ci_low": 0.76, "ci_high": 0.83},
    "online_minus_base": {"diff": 0.5, "ci_low": 0.45, "ci_high": 0.55},
}
