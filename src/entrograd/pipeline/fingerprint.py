"""What unfinished work belongs to: stage, parameters, inputs and code. Work is continued only
where all four are the same, so that what comes out is what one uninterrupted run gives."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from entrograd.pipeline.modules import LOADER, SOURCE, modules, reached_by_name
from entrograd.storage.files import read_json
from entrograd.storage.hashing import sha256, text_hash

log = logging.getLogger("entrograd")

FILE = "fingerprint.json"
LONGEST_VALUE = 60  # characters of a value that a difference shows
MOST_DIFFERENCES = 8  # parameters that are listed
MOST_FILES = 4  # of code that are listed


class Fingerprint(TypedDict):
    """The identity of a run, as JSON. `contents`: the hashes of `inputs`, in their order."""

    stage: str
    params: dict[str, object]
    inputs: dict[str, str]
    contents: list[str]
    roles: dict[str, object]
    code: dict[str, str]


def fingerprint(
    stage: str,
    params: Mapping[str, object],
    inputs: Mapping[str, str],
    roles: Mapping[str, object],
    code: Mapping[str, str],
) -> Fingerprint:
    """The identity of a run. `inputs`: path -> sha256; where they lie does not matter, so their
    hashes in the order of the arguments count. `roles`: which inputs were given. `code`: as
    `hashes_of` tells."""
    known = {
        "stage": stage,
        "params": params,
        "inputs": inputs,
        "contents": list(inputs.values()),  # a JSON file keeps the order of a list alone
        "roles": roles,
        "code": dict(code),
    }
    plain: Fingerprint = json.loads(json.dumps(known, default=str))
    return plain


def key(identity: Fingerprint) -> str:
    """16 hex digits that differ where anything differs that could change a result."""
    parts = [identity["params"], identity["roles"], identity["contents"]]
    text = json.dumps(parts, sort_keys=True)
    return text_hash(identity["stage"], text, json.dumps(identity["code"], sort_keys=True))[:16]


def differences(before: Fingerprint, now: Fingerprint) -> list[str]:
    """What changed from one fingerprint to another, a phrase each: the first parameters with both
    values, every input whose content differs, every file of code that does."""
    changed = [] if before["stage"] == now["stage"] else [f"stage {before['stage']}"]
    old, new = dict(_leaves(before["params"])), dict(_leaves(now["params"]))
    others = [
        f"{name} {_short(old.get(name, 'absent'))} -> {_short(new.get(name, 'absent'))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "absent") != new.get(name, "absent")
    ]
    changed += others[:MOST_DIFFERENCES]
    if more := others[MOST_DIFFERENCES:]:
        changed.append(f"and {len(more)} more parameters")
    if before.get("contents") != now["contents"]:
        was = set(before["inputs"].values())
        others = [path for path, digest in now["inputs"].items() if digest not in was]
        changed.append(f"the content of {', '.join(others) or 'the inputs'}")
    elif before["roles"] != now["roles"]:
        changed.append("which inputs were given")
    if before["code"] != now["code"]:
        files = sorted(
            file
            for file in before["code"].keys() | now["code"].keys()
            if before["code"].get(file) != now["code"].get(file)
        )
        rest = f" and {len(files) - MOST_FILES} more" if len(files) > MOST_FILES else ""
        changed.append(f"the code of {', '.join(files[:MOST_FILES])}{rest}")
    return changed


def note_other_work(work: Path, now: Fingerprint) -> None:
    """Say of each unfinished run of this stage that is not continued what is different now."""
    mine = f"{now['stage']}-{key(now)}"
    if (work / mine).exists():
        return
    for file in sorted(work.glob(f"{now['stage']}-*/{FILE}")):
        if not _begun(file.parent):
            continue
        log.warning(
            "%s holds unfinished work that is not continued: changed since: %s. This run starts "
            "anew; undo the change to go on there, or remove that folder",
            file.parent,
            "; ".join(differences(read_json(file), now)),
        )


@contextmanager
def kept_if_begun(folder: Path) -> Iterator[None]:
    """Remove the folder at the end of the block, however it ends, where it holds nothing to go on
    with."""
    try:
        yield
    finally:
        if not _begun(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _begun(folder: Path) -> bool:
    """Whether there is work in it: more than its fingerprint, and half-written files."""
    return any(file.name != FILE for file in folder.glob("[!.]*"))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Every value with its name; those of a list are numbered."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for part, inner in value.items():
            yield from _leaves(inner, f"{name}.{part}".strip("."))
    else:
        yield name, value


def files_of(script: Path, components: Iterable[str] = ()) -> set[Path]:
    """The files that a stage's script runs on, itself included: an edit to any other leaves its
    unfinished work as it is. `components`: the modules of those of its method, if it has one; they
    count if the stage loads them."""
    files = {script, *modules(script)}
    return files | reached_by_name(components) if LOADER in files else files


def hashes_of(files: Iterable[Path]) -> dict[str, str]:
    """The sha256 of files of code by path, from the folder of the stages or that of the package."""
    return {_name(file): sha256(file) for file in sorted(files)}


def _name(file: Path) -> str:
    root = SOURCE if file.is_relative_to(SOURCE) else file.parent.parent
    return file.relative_to(root).as_posix()
