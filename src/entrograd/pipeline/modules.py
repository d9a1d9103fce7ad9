"""Which files of this package a stage runs on, read from the source: nothing is imported or run.

DVC follows no imports, so dvc.yaml lists the files of every stage (`entrograd deps --write` writes
the lists), and unfinished work is keyed by the same ones.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
SOURCE = PACKAGE.parent
# Names the components of methods, of which a run uses a few: they are not followed from here.
REGISTRY = PACKAGE / "methods" / "presets.py"
LOADER = PACKAGE / "methods" / "registry.py"  # what loads them

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


def components() -> set[Path]:
    """The files of all components of methods, and what they import."""
    return _with_imports(named(REGISTRY))


def reached_by_name(names: Iterable[str]) -> set[Path]:
    """The files of these modules, by dotted name, and what they import."""
    return _with_imports({path for name in names for path in _files(name)})


def _with_imports(files: set[Path]) -> set[Path]:
    return {path for path in files.union(*map(modules, files)) if path.stat().st_size}


def imported(file: Path) -> set[Path]:
    """The files of the package that `file` itself imports."""
    return set(_references(file, file.stat().st_mtime_ns)[0])


def named(file: Path) -> set[Path]:
    """The files of the package whose modules `file` names as text, to load them when needed."""
    return set(_references(file, file.stat().st_mtime_ns)[1])


@functools.cache
def _references(file: Path, _changed: int) -> tuple[frozenset[Path], frozenset[Path]]:
    """What `imported` and `named` tell of a file that was last changed at that time (ns)."""
    imports: set[Path] = set()
    texts: set[Path] = set()
    for node in _nodes(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imports |= _files(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            imports |= _files(node.module)
            for alias in node.names:
                imports |= _files(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Constant) and _NAME.fullmatch(str(node.value)):
            texts |= _files(str(node.value).partition(":")[0])
    return frozenset(imports - {file}), frozenset(texts - {file})


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
