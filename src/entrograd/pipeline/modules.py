"""Which modules a stage runs on, read from the source: nothing is imported or executed.

DVC follows no imports, so dvc.yaml lists the modules of every stage; unfinished work is keyed by
the same ones. `entrograd deps --write` writes the lists.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
SOURCE = PACKAGE.parent


def modules(file: Path) -> set[Path]:
    """Every file of the package that `file` reaches through imports; files without a line of code
    are left out."""
    reached: set[Path] = set()
    waiting = [file]
    while waiting:
        new = imported(waiting.pop()) - reached
        reached |= new
        waiting += new
    return {path for path in reached if path.stat().st_size}


def imported(file: Path) -> set[Path]:
    """The files of the package that `file` itself imports, wherever in it the import stands."""
    found: set[Path] = set()
    for node in _nodes(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= _files(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= _files(node.module)
            for alias in node.names:
                found |= _files(f"{node.module}.{alias.name}")
    return found - {file}


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
