"""What an edit re-runs, by DVC's own word, and whether an unfinished online run goes on.

The table in docs/architecture.md is what these runs say.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from helpers.checkout import environment, fresh_clone, run
from helpers.paths import ROOT
from helpers.tables import write_prompts

UNFINISHED = "train_online"


@dataclass(frozen=True)
class Edit:
    """A change, in words, to a key of params.yaml (`section.key=value`) or to a file's end."""

    words: str
    file: str = "params.yaml"
    key: str = ""
    value: object = None

    def apply(self, folder: Path) -> None:
        path = folder / self.file
        if not self.key:
            path.write_text(path.read_text() + "\n# edited\n")
            return
        params = yaml.safe_load(path.read_text())
        *sections, last = self.key.split(".")
        block = params
        for name in sections:
            block = block.setdefault(name, {})
        assert block.get(last) != self.value
        block[last] = self.value
        path.write_text(yaml.safe_dump(params, sort_keys=False))


SOURCE = "src/entrograd"
EDITS = (
    Edit("`report.title`", key="report.title", value="other"),
    Edit("`report/params.py`", f"{SOURCE}/report/params.py"),
    Edit("`report/plots.py`", f"{SOURCE}/report/plots.py"),
    Edit("`rollout.sampling.temperature`", key="rollout.sampling.temperature", value=0.9),
    Edit(
        "`execution.train_online.token_budget`", key="execution.train_online.token_budget", value=9
    ),
    Edit("`score.confidence`", key="score.confidence", value=0.9),
    Edit("an unused component, `methods/advantage/asr.py`", f"{SOURCE}/methods/advantage/asr.py"),
    Edit("one in use, `methods/advantage/gtpo.py`", f"{SOURCE}/methods/advantage/gtpo.py"),
    Edit("`rewards/verify/equivalence.py`", f"{SOURCE}/rewards/verify/equivalence.py"),
    Edit("`storage/files.py`", f"{SOURCE}/storage/files.py"),
)


def changed(folder: Path) -> set[str]:
    """The stages that `dvc status` names."""
    with Repo(str(folder)) as repo:
        return {address.rpartition(":")[-1] for address in repo.status()}


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Stage train_online as dvc.yaml starts it, killed at the end of the block."""
    command = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"][UNFINISHED]["cmd"]
    words = [sys.executable, *shlex.split(command)[1:], *arguments]
    process = subprocess.Popen(
        words, cwd=folder, env=environment(), text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def reads(process: subprocess.Popen[str], found: Callable[[str], bool]) -> str:
    """The first line that `found` takes; the test fails with all lines if there is none."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found(line):
            return line
    pytest.fail("".join(lines))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A clone whose outputs DVC takes for those of its code, and an online run that was killed
    after its second update. What training reads is real, the other outputs are names."""
    folder = fresh_clone(tmp_path_factory.mktemp("rerun"), tiny_model)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["train_online"]["rounds"] = 100_000
    params["execution"]["train_online"] = {"checkpoint": {"max_fraction": 1.0}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for name, stage in yaml.safe_load((folder / "dvc.yaml").read_text())["stages"].items():
        entries = [*stage.get("outs", ()), *stage.get("metrics", ()), *stage.get("plots", ())]
        for out in (entry if isinstance(entry, str) else next(iter(entry)) for entry in entries):
            path = folder / out
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.name.endswith(".run.json"):
                path.write_text(json.dumps({"stage": name}))
            elif path.suffix:
                path.write_text("{}")
            elif path.parent.name == "models":
                shutil.copytree(tiny_model, path)
            else:
                path.mkdir()
                (path / "file").write_text(out)
    write_prompts(folder / "data/prompts.parquet", 20)
    heads = {"completions": 8, "heads": {}, "log_base": 2.718281828459045, "tau": 2.0}
    (folder / "results/reward_heads.json").write_text(json.dumps(heads))
    run(folder, sys.executable, "stages/method.py")
    run(folder, "dvc", "commit", "--force")
    assert changed(folder) == set()
    with started(folder) as process:
        reads(process, lambda line: "/100000 rounds" in line and not line.startswith("1/"))
    assert list((folder / ".entrograd/resume").glob(f"{UNFINISHED}-*/*"))
    return folder


def continued(folder: Path) -> bool:
    """Whether the stage goes on where it was; else it must say that things changed."""
    (work,) = (folder / ".entrograd/resume").glob(f"{UNFINISHED}-*")
    with started(folder, "--resume", str(work)) as process:
        line = reads(process, lambda s: "continuing after update" in s or "error:" in s)
    assert "continuing" in line or "cannot be continued, changed since" in line
    return "continuing" in line


@contextmanager
def undone(folder: Path, edit: Edit) -> Iterator[None]:
    """The block with the edit in force."""
    path = folder / edit.file
    before = path.read_bytes()
    edit.apply(folder)
    try:
        yield
    finally:
        path.write_bytes(before)


def row(folder: Path, edit: Edit) -> str:
    """A line of the table: what DVC names, and for stage method alone, what it names after it."""
    with undone(folder, edit):
        named = changed(folder)
        words = _list(named)
        if named == {"method"}:
            run(folder, "dvc", "repro", "method")
            words += f"; once it has run: {_list(changed(folder))}"
        goes_on = continued(folder)
    if named == {"method"}:
        run(folder, "dvc", "repro", "method")
    assert changed(folder) == set()
    return f"| {edit.words} | {words} | {'yes' if goes_on else 'no'} |"


def _list(stages: set[str]) -> str:
    order = list(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
    if len(stages) == len(order):
        return "all"
    return ", ".join(f"`{name}`" for name in order if name in stages) or "none"


def test_the_table_of_the_docs_is_what_dvc_says(clone: Path) -> None:
    head = "| edit to | stages that `dvc status` names | an unfinished online run goes on |\n"
    table = head + "|---|---|---|\n" + "\n".join(row(clone, edit) for edit in EDITS) + "\n"
    docs = (ROOT / "docs/architecture.md").read_text()
    assert table in docs, f"docs/architecture.md lacks this table:\n{table}"
