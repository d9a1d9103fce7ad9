"""The shape of the project: import directions, and the lists of dvc.yaml."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml

from entrograd.cli.main import main
from entrograd.pipeline import deps, runner
from entrograd.pipeline.modules import PACKAGE, components, imported, modules
from helpers.paths import ROOT

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


def test_no_test_imports_another() -> None:
    """What two test files need is in tests/helpers, which imports no test."""
    tests = ROOT / "tests"
    names = "|".join(file.stem for file in tests.glob("*.py"))
    line = re.compile(rf"^\s*(?:from|import) (?:tests\.)?(?:{names})\b", re.MULTILINE)
    for file in tests.rglob("*.py"):
        assert not line.search(file.read_text()), relative(file)


def test_there_is_one_script_a_stage() -> None:
    assert {file.stem for file in STAGES} == set(PIPELINE)


class TestListsOfCode:
    """DVC does not follow imports: a file that is not listed changes results unnoticed."""

    def test_they_are_what_deps_writes(self) -> None:
        text = (ROOT / "dvc.yaml").read_text()
        assert deps.differences(text, deps.with_code(text)) == []
        assert deps.with_code(text) == text, "entrograd deps --write"

    def test_a_stage_lists_its_script_and_what_it_reaches(self) -> None:
        listed = set(PIPELINE["rollout"]["deps"])
        assert listed >= {
            "stages/rollout.py",
            "src/entrograd/rollout/rollout.py",
            "src/entrograd/models/cpu/attention.py",  # through others
            "src/entrograd/rollout/vllm_worker.py",  # named as text, loaded by vLLM
        }
        assert "src/entrograd/train/step.py" not in listed
        assert "src/entrograd/report/page.html.jinja" in PIPELINE["report"]["deps"]

    def test_components_are_listed_by_stage_method_alone(self) -> None:
        """Training depends on the file that stands for those in use."""
        every = {relative(file) for file in components()}
        assert every <= set(PIPELINE["method"]["deps"])
        unused = "src/entrograd/methods/advantage/asr.py"
        trains = [name for name, stage in PIPELINE.items() if "method" in stage["params"]]
        for name in set(trains) - {"method", "report"}:
            assert "data/method.json" in PIPELINE[name]["deps"]
            assert "--method data/method.json" in PIPELINE[name]["cmd"]
            assert unused not in PIPELINE[name]["deps"]

    def test_only_lines_of_code_change(self) -> None:
        text = """# a pipeline
stages:
  report:   # the last
    cmd: python stages/report.py
    deps:
    - results/summary.json   # what it shows
    - src/entrograd/gone.py
    - mine.csv
    params:
    - report
  other:
    cmd: echo
    deps:
    - src/mine.py
"""
        after = deps.with_code(text)
        assert deps.with_code(after) == after
        kept = [line for line in after.splitlines() if "src/entrograd/" not in line]
        expected = [line for line in text.splitlines() if "gone" not in line]
        expected.insert(7, "    - stages/report.py")
        assert kept == expected
        said = deps.differences(text, after)
        assert said[0].startswith("report lacks src/entrograd/__init__.py, ")
        assert said[1] == "report needs no src/entrograd/gone.py"
        assert len(said) == 2

    def test_the_command(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(deps, "ROOT", tmp_path)
        assert main(["deps"]) == 2
        assert "dvc.yaml: no such file" in capsys.readouterr().err
        (tmp_path / "stages").mkdir()
        (tmp_path / "stages" / "a.py").write_text("import os")
        (tmp_path / "dvc.yaml").write_text("stages:\n  a:\n    cmd: a\n    deps:\n")
        assert main(["deps"]) == 2
        assert "a lacks stages/a.py\nwrite it: entrograd deps --write" in capsys.readouterr().err
        assert main(["deps", "--write"]) == 0
        assert capsys.readouterr().out == "dvc.yaml: 1 changes\n"
        assert (tmp_path / "dvc.yaml").read_text().endswith("    deps:\n    - stages/a.py\n")
        assert main(["deps"]) == 0


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


@pytest.mark.parametrize(
    ("file", "function", "most"),
    [("step", "train_step", 30), ("online", "train_online", 60), ("offline", "train_offline", 60)],
)
def test_the_loop_is_a_screen(file: str, function: str, most: int) -> None:
    """Lines of the body, without the docstring."""
    tree = ast.parse((PACKAGE / f"train/{file}.py").read_text())
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    assert ast.get_docstring(found)
    assert found.end_lineno is not None
    assert found.end_lineno - found.body[0].end_lineno <= most  # type: ignore[operator]


def test_files_are_short() -> None:
    long = {
        relative(file): lines
        for folder in (PACKAGE, ROOT / "stages", ROOT / "flows")
        for file in folder.rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > 300
    }
    assert long == {}
    assert all(len(file.read_text().splitlines()) <= 45 for file in STAGES)


def test_few_signatures_say_any() -> None:
    """`Any` switches the type checker off: it is for foreign code without types and JSON."""
    saying = [
        f"{relative(file)}: {node.name}"
        for folder in (PACKAGE, ROOT / "stages", ROOT / "flows", ROOT / "benchmarks")
        for file in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "Any" in names_in(node)
    ]
    assert len(saying) <= 60, "\n".join(saying)


def names_in(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """The names in the annotations of its parameters and of what it returns."""
    whole = [function.args, *([function.returns] if function.returns else [])]
    nodes = [node for part in whole for node in ast.walk(part)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
