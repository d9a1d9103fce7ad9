"""The lists of code in dvc.yaml: every file of this package that a stage runs on.

Nobody types them: `entrograd deps --write` replaces, in each stage's `deps`, the lines of code by
those that the imports tell. Data, comments and all else stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from entrograd.errors import InputError
from entrograd.pipeline.modules import PACKAGE, components, modules

ROOT = PACKAGE.parent.parent
METHOD = "method"

_CODE = re.compile(r"^    - ((?:src/entrograd|stages)/.*)\n", re.MULTILINE)
_STAGE = re.compile(r"^  (?P<name>\w+):.*\n(?:(?!  \w|\w).*\n)*", re.MULTILINE)
_DEPS = re.compile(r"^(?P<head>    deps:.*\n)(?P<lines>(?:    [-# ].*\n)*)", re.MULTILINE)


def code(script: Path) -> list[str]:
    """The files that a stage's script runs on, itself included, as dvc.yaml names them. Components
    of methods are listed by stage `method`, whose output stands for those in use."""
    files = {script, *modules(script)}
    if script.stem == METHOD:
        files |= components()
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def with_code(text: str) -> str:
    """The text of dvc.yaml with every stage's lines of code as they must be."""
    return _STAGE.sub(_stage, text)


def differences(before: str, after: str) -> list[str]:
    """What `with_code` adds and removes, a sentence per stage."""
    old, new = (
        {m["name"]: set(_CODE.findall(m[0])) for m in _STAGE.finditer(text)}
        for text in (before, after)
    )
    changes = []
    for stage, lines in new.items():
        for words, paths in (("lacks", lines - old[stage]), ("needs no", old[stage] - lines)):
            if paths:
                changes.append(f"{stage} {words} {', '.join(sorted(paths))}")
    return changes


def _stage(match: re.Match[str]) -> str:
    script = ROOT / "stages" / f"{match['name']}.py"
    if not script.exists():
        return match[0]
    if not _DEPS.search(match[0]):
        raise InputError(f"dvc.yaml: stage {match['name']} has no deps; add the line `deps:`")
    return _DEPS.sub(lambda deps: deps["head"] + _with(deps["lines"], code(script)), match[0])


def _with(lines: str, files: Iterable[str]) -> str:
    kept = [line for line in lines.splitlines(keepends=True) if not _CODE.fullmatch(line)]
    return "".join([*kept, *(f"    - {file}\n" for file in files)])
