"""What section `method` stands for, as a file: four components, their parameters and their code.

A preset's components follow from its name, which DVC cannot look up. So stage `method` writes this
file and training depends on it, not on every component there is: an edit to a component that the
run does not use leaves the file, and what was trained, as it is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from entrograd.errors import InputError
from entrograd.methods.params import MethodParams
from entrograd.methods.registry import recipe
from entrograd.pipeline.fingerprint import hashes_of
from entrograd.pipeline.modules import reached_by_name
from entrograd.storage.files import read_json, write_json


def resolve(section: MethodParams, out: Path) -> str:
    """Write the file; returns the one-line result. InputError if the section is broken."""
    write_json(out, resolved(section))
    return section.title


def check_resolved(section: MethodParams, file: Path) -> None:
    """InputError if `file` is not what `section` stands for now: DVC would record what is trained
    with the method of that file."""
    there, now = read_json(file), resolved(section)
    if there == now:
        return
    changed = [key for key in now if not isinstance(there, dict) or there.get(key) != now[key]]
    raise InputError(
        f"{file}: is not section method as it is now (changed: {', '.join(changed)}); run "
        f"`python stages/method.py --out {file}`, or leave --method out"
    )


def resolved(section: MethodParams) -> dict[str, object]:
    """Per choice the component with its parameters, defaults included, and the sha256 of every file
    of the package that the four run on, by path. InputError if the section is broken."""
    used = recipe(section)
    components = {part.choice: {"name": part.name, **vars(part)} for part in used.components}
    content: dict[str, object] = {
        "name": used.name,
        "components": {choice: _plain(values) for choice, values in components.items()},
        "estimator": used.estimator,
        "code": hashes_of(reached_by_name(section.modules)),
    }
    plain: dict[str, object] = json.loads(json.dumps(content))  # as it is read again
    return plain


def _plain(values: dict[str, object]) -> dict[str, object]:
    """Values that JSON has: an infinite one as text."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }
