"""What unfinished work belongs to: stage, parameters, inputs and code. Work is continued only
where all four are the same, so that what comes out is what one uninterrupted run gives."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from entrograd import io

log = logging.getLogger("entrograd")

FILE = "origin.json"


def origin(
    stage: str, params: Mapping[str, Any], inputs: Mapping[str, str], roles: Mapping[str, Any]
) -> dict[str, Any]:
    """The identity of a run. `inputs`: path -> sha256; where they lie does not matter, so their
    hashes in the order of the arguments count. `roles`: which inputs were given."""
    known = {
        "stage": stage,
        "params": params,
        "inputs": inputs,
        "contents": list(inputs.values()),  # a JSON file keeps the order of a list alone
        "roles": roles,
        "code": io.code_hash(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(known, default=str))
    return plain


def key(origin: Mapping[str, Any]) -> str:
    """16 hex digits that differ where anything differs that could change a result."""
    identity = [origin["params"], origin["roles"], origin["contents"]]
    text = json.dumps(identity, sort_keys=True)
    return io.text_hash(origin["stage"], text, origin["code"])[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed from one origin to another, a phrase each: every parameter with both values,
    every input whose content differs, the code."""
    changed = [] if before["stage"] == now["stage"] else [f"stage {before['stage']}"]
    old, new = dict(_leaves(before["params"])), dict(_leaves(now["params"]))
    changed += [
        f"{name} {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "absent") != new.get(name, "absent")
    ]
    if before.get("contents") != now["contents"]:
        was = set(before["inputs"].values())
        others = [path for path, digest in now["inputs"].items() if digest not in was]
        changed.append(f"the content of {', '.join(others) or 'the inputs'}")
    elif before["roles"] != now["roles"]:
        changed.append("which inputs were given")
    if before["code"] != now["code"]:
        changed.append("the code of entrograd")
    return changed


def note_other_work(work: Path, now: Mapping[str, Any]) -> None:
    """Say of each unfinished run of this stage that is not continued what is different now."""
    mine = f"{now['stage']}-{key(now)}"
    if (work / mine).exists():
        return
    for file in sorted(work.glob(f"{now['stage']}-*/{FILE}")):
        log.warning(
            "%s holds unfinished work that is not continued: changed since: %s. This run starts "
            "anew; undo the change to go on there, or remove that folder",
            file.parent,
            "; ".join(differences(io.read_json(file), now)),
        )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for part, inner in value.items():
            yield from _leaves(inner, f"{name}.{part}".strip("."))
    else:
        yield name, value
