"""The shape of the project: import directions, and the dependency lists of dvc.yaml."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from entrograd.methods.registry import METHODS
from entrograd.pipeline import runner
from entrograd.pipeline.modules import PACKAGE, imported, modules
from helpers.paths import ROOT

REGISTRY = PACKAGE / "methods" / "registry.py"
STAGES = sorted((ROOT / "stages").glob("*.py"))
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

# What a package may never reach, directly or through others.
WORK = {"methods", "train", "data", "models", "rollout", "rewards", "annotate"}
FORBIDDEN = {
    "storage": WORK | {"pipeline"},
    "numerics": WORK | {"pipeline"},
    "methods": WORK - {"methods"} | {"evaluate", "report"},
    "data": WORK - {"data"} | {"evaluate", "report"},
    "models": WORK - {"models", "data"} | {"evaluate", "report"},
    "rollout": {"train", "methods", "rewards", "annotate", "evaluate", "report"},
    "rewards": {"train", "methods", "models", "rollout", "annotate", "evaluate", "report"},
    "annotate": {"train", "methods", "rollout", "evaluate", "report"},
    "evaluate": {"train", "methods", "report"},
    "report": {"train", "methods", "models", "rollout"},
}
# Tracks the method that method.name names; one taken for its credit alone needs its own line.
CHOSEN = "src/entrograd/methods/${method.name}.py"


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package: str) -> None:
    """The models of params.yaml (PACKAGE/params.py) compute nothing: they are open to all."""
    for file in (PACKAGE / package).rglob("*.py"):
        reached = {f.relative_to(PACKAGE).parts[0] for f in modules(file) if f.name != "params.py"}
        wrong = reached & FORBIDDEN[package]
        assert not wrong, f"{relative(file)} reaches {sorted(wrong)}"


def test_flows_import_neither_torch_nor_the_library() -> None:
    for file in (ROOT / "flows").glob("*.py"):
        text = file.read_text()
        assert not imported(file), relative(file)
        assert not re.search(r"^\s*(import|from) torch\b", text, re.MULTILINE), relative(file)


def test_no_test_imports_another() -> None:
    """What two test files need is in tests/helpers, which imports no test."""
    tests = ROOT / "tests"
    names = "|".join(file.stem for file in tests.glob("*.py"))
    line = re.compile(rf"^\s*(?:from|import) (?:tests\.)?(?:{names})\b", re.MULTILINE)
    for file in tests.rglob("*.py"):
        assert not line.search(file.read_text()), relative(file)


def test_there_is_one_script_a_stage() -> None:
    assert {file.stem for file in STAGES} == set(PIPELINE)


@pytest.mark.parametrize("script", STAGES, ids=lambda path: path.stem)
def test_dvc_lists_every_module_a_stage_imports(script: Path) -> None:
    """DVC does not follow imports: a module that is not listed changes results unnoticed."""
    listed = set(PIPELINE[script.stem]["deps"])
    needed = {relative(f) for f in {script} | modules(script)}
    if relative(REGISTRY) in needed:
        assert CHOSEN in listed
        needed |= {relative(f) for f in method_files() if f.stat().st_size}
        needed.discard(relative(REGISTRY))
    missing, stale = needed - listed, {d for d in listed if d.endswith(".py")} - needed
    stale -= {CHOSEN}
    assert not missing, f"dvc.yaml: {script.stem}: add to deps: {sorted(missing)}"
    assert not stale, f"dvc.yaml: {script.stem}: remove from deps: {sorted(stale)}"


def method_files() -> set[Path]:
    """The file of every method, whichever params.yaml names, and those they import."""
    found = {REGISTRY.parent / f"{name}.py" for name in METHODS}
    return found.union(*map(modules, found))


@pytest.mark.parametrize("script", STAGES, ids=lambda path: path.stem)
def test_stage_reads_the_sections_dvc_watches(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A section that is read but not watched would leave a stale result."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(runner, "run_stage", lambda *_, **told: given.update(told) or 0)
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    read = set(given["params"].model_fields)
    assert read == set(PIPELINE[script.stem]["params"])


def test_files_are_short() -> None:
    long = {
        relative(file): lines
        for folder in (PACKAGE, ROOT / "stages", ROOT / "flows")
        for file in folder.rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > 320
    }
    assert long == {}
    assert all(len(file.read_text().splitlines()) <= 45 for file in STAGES)
