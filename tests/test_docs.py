"""The documents: links lead somewhere, and what they repeat of the project is so."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import make_api
import pytest
import yaml

from helpers.paths import ROOT

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
LINK = re.compile(r"\]\(([^)#:]+)(?:#([^)]+))?\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    if page.name == "api.md":
        return  # written by make docs; its links lead within it
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        place = page.parent / target
        assert place.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(place), f"{page.name}: {target}#{anchor}"


def test_the_index_leads_to_every_page() -> None:
    linked = {target for target, _ in LINK.findall((ROOT / "docs/index.md").read_text())}
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md", "api.md"}
    assert pages <= linked


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_glossary_has_each_word_once() -> None:
    words = re.findall(
        r"^\| (?!word|---)([^|]+?) \|", (ROOT / "docs/glossary.md").read_text(), re.M
    )
    assert len(words) == len(set(words)) > 60


def test_the_api_page_has_every_module_and_public_name() -> None:
    page = make_api.page()
    for file in make_api.SOURCE.rglob("*.py"):
        if not file.stat().st_size:
            continue
        assert f"\n## {make_api.name(file)}\n" in page
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_":
                assert f"\n### {node.name}\n" in page
    assert "\ndef train_step(" in page


def test_hooks_run_targets_of_the_makefile() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text()
    for hook in hooks:
        program, target = hook["entry"].split()
        if program == "make":
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), hook["id"]
        else:
            assert (program, target) == (".venv/bin/entrograd", "check")


def test_one_version_and_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text()
