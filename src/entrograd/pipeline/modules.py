"""Which files of this package a stage runs on, read from the source: nothing is imported or run.

DVC follows no imports, so dvc.yaml lists the files of every stage (`entrograd deps --write` writes
the lists), and unfinished work is keyed by the same ones.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
SOURCE = PACKAGE.parent
# Names the components of methods, of which a run uses a few: they are not followed from here.
REGISTRY = PACKAGE / "methods" / "presets.py"

_NAME = re.compile(rf"{PACKAGE.name}(\.\w+)+(:\w+)?")


def modules(file: Path) -> set[Path]:
    """Every file of the package that `file` reaches: through imports, wherever in a file they
    stand, and through modules named as text, such as "entrograd.methods.gtpo"; and the data beside
    them. Files without content are left out."""
    reached: set[Path] = set()
    waiting = [file]
    while waiting:
        here = waiting.pop()
        new = (imported(here) | (named(here) if here != REGISTRY else set())) - reached
        reached |= new
        waiting += new
    reached |= {data for module in reached for data in _data(module.parent)}
    return {path for path in reached if path.stat().st_size}


def imported(file: Path) -> set[Path]:
    """The files of the package that `file` itself imports."""
    files: set[Path] = set()
    for node in _nodes(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                files |= _files(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            files |= _files(node.module)
            for alias in node.names:
                files |= _files(f"{node.module}.{alias.name}")
    return files - {file}


def named(file: Path) -> set[Path]:
    """The files of the package whose modules `file` names as text, to load them when needed."""
    texts = (
        node.value
        for node in _nodes(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return {
        path for text in texts if _NAME.fullmatch(text) for path in _files(text.partition(":")[0])
    } - {file}


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _nodes(child)


def _files(module: str) -> set[Path]:
    """The file of a module of this package and those of the packages around it."""
    parts = module.split(".")
    if parts[0] != PACKAGE.name:
        return set()
    files = set()
    for depth in range(1, len(parts) + 1):
        base = SOURCE.joinpath(*parts[:depth])
        files |= {f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()}
    return files


def _data(folder: Path) -> Iterator[Path]:
    """The files in a package's folder that are no Python, such as a template."""
    return (f for f in folder.glob("[!.]*") if f.is_file() and f.suffix != ".py")
