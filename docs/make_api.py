"""Write docs/api.md: every public class and function of the library with its docstring.

    python docs/make_api.py        (make docs)

The source is read, not imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from copy import copy
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"


def page() -> str:
    """The page: a section per module, in the order of their names."""
    files = [file for file in sorted(SOURCE.rglob("*.py")) if file.stat().st_size]
    contents = [f"- [{name(file)}](#{name(file).replace('.', '')})" for file in files]
    head = ["# API", "Written by `make docs` from the source."]
    return "\n\n".join([*head, "\n".join(contents), *map(section, files)]) + "\n"


def name(file: Path) -> str:
    """The module's dotted name."""
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def section(file: Path) -> str:
    """A module: its docstring and its public classes and functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    parts = [f"## {name(file)}", text(tree)]
    for node in public(tree):
        parts += [f"### {node.name}", code(node), text(node)]
        if isinstance(node, ast.ClassDef):
            for method in public(node):
                parts += [code(method), text(method)]
    return "\n\n".join(part for part in parts if part)


def public(tree: ast.Module | ast.ClassDef) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """The classes and functions of a body whose names do not begin with an underscore."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def code(node: ast.ClassDef | ast.FunctionDef) -> str:
    """The head of a class or function, without its body."""
    bare = copy(node)
    of_class = node.body if isinstance(node, ast.ClassDef) else []
    fields: list[ast.stmt] = [part for part in of_class if isinstance(part, ast.AnnAssign)]
    bare.body = fields or [ast.Expr(ast.Constant(...))]
    return f"```python\n{ast.unparse(ast.fix_missing_locations(bare))}\n```"


def text(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """The docstring, so that Markdown shows it as it stands."""
    said = ast.get_docstring(node) or ""
    return "\n".join(
        line if line.startswith("    ") else line.replace("<", "&lt;").replace("*", "\\*")
        for line in said.splitlines()
    )


if __name__ == "__main__":
    (ROOT / "docs" / "api.md").write_text(page(), encoding="utf-8")
