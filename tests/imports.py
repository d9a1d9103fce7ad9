"""Which project modules a Python file imports, read from its source: nothing is executed."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
# It imports the methods by name: what lists them is to name each method's own file.
REGISTRY = SOURCE / "entrograd" / "methods" / "__init__.py"


def direct(file: Path) -> set[Path]:
    """Files of this project that `file` imports, wherever in it the import stands."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found |= _files(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= _files(node.module)
            for alias in node.names:
                found |= _files(f"{node.module}.{alias.name}")
    return found - {file}


def closure(file: Path) -> set[Path]:
    """All files `file` reaches through imports; the registry is reached, not passed through."""
    reached: set[Path] = set()
    waiting = [file]
    while waiting:
        for found in direct(waiting.pop()):
            if found not in reached:
                reached.add(found)
                if found != REGISTRY:
                    waiting.append(found)
    return reached


def _files(module: str) -> set[Path]:
    """The file of a module of this project and those of the packages around it."""
    parts = module.split(".")
    if parts[0] not in ("entrograd", "flows"):
        return set()
    root = SOURCE if parts[0] == "entrograd" else ROOT
    files = set()
    for depth in range(1, len(parts) + 1):
        base = root.joinpath(*parts[:depth])
        files |= {f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()}
    return files
