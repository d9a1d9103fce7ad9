"""The shape of the project: import directions, and the dependency lists of dvc.yaml."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from entrograd.methods.presets import COMPONENTS
from entrograd.pipeline import runner
from entrograd.pipeline.modules import PACKAGE, imported, modules

REGISTRY = PACKAGE / "methods" / "registry.py"
STAGES = sorted((ROOT / "stages").glob("*.py"))
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

OPEN = {"params.py", "presets.py"}
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


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package: str) -> None:
    """The models of params.yaml and the names it may use compute nothing: they are open to all."""
    for file in (PACKAGE / package).rglob("*.py"):
        reached = {f.relative_to(PACKAGE).parts[0] for f in modules(file) if f.name not in OPEN}
        wrong = reached & FORBIDDEN[package]
        assert not wrong, f"{relative(file)} reaches {sorted(wrong)}"


def test_flows_import_neither_torch_nor_the_library() -> None:
    for file in (ROOT / "flows").glob("*.py"):
        text = file.read_text()
        assert not imported(file), relative(file)
        assert not re.search(r"^\s*(import|from) torch\b", text, re.MULTILINE), relative(file)


def test_there_is_one_script_a_stage() -> None:
    assert {file.stem for file in STAGES} == set(PIPELINE)


@pytest.mark.parametrize("script", STAGES, ids=lambda path: path.stem)
def test_dvc_lists_every_module_a_stage_imports(script: Path) -> None:
    """DVC does not follow imports: a module that is not listed changes results unnoticed."""
    listed = set(PIPELINE[script.stem]["deps"])
    needed = {relative(f) for f in {script} | modules(script)}
    if relative(REGISTRY) in needed:
        needed |= {relative(f) for f in component_files()}
    missing, stale = needed - listed, {d for d in listed if d.endswith(".py")} - needed
    assert not missing, f"dvc.yaml: {script.stem}: add to deps: {sorted(missing)}"
    assert not stale, f"dvc.yaml: {script.stem}: remove from deps: {sorted(stale)}"


def component_files() -> set[Path]:
    """The file of every component, whichever params.yaml names, and those they import."""
    names = (name for names in COMPONENTS.values() for name in names.values())
    places = {PACKAGE.parent / f"{name.partition(':')[0].replace('.', '/')}.py" for name in names}
    return places.union(*map(modules, places))


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
