"""A stage's outputs: where they may lie and what they may replace.

A stage replaces what it made and nothing else: `OUTPUT.run.json` says what it made. (DVC removes
the outputs of a stage before it runs it.)
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from entrograd.errors import InputError
from entrograd.pipeline.manifest import made_by, manifest
from entrograd.storage.files import sweep, write_json


def check_outputs(
    stage: str,
    outputs: Mapping[str, Path],
    folders: Collection[str],
    inputs: Collection[Path],
    work: Path,
) -> None:
    """InputError where an output could not be written, or would take something else's place.

    Args:
        stage: whose outputs they are.
        outputs: path by argument, as `--out`.
        folders: the arguments whose output is a folder.
        inputs: every file and folder the run reads.
        work: the folder of unfinished work.
    """
    for flag, path in outputs.items():
        check_writable(path)
        if Path.cwd().is_relative_to(path.resolve()):
            raise InputError(f"{path}: holds the current folder; give another {flag}")
        others = [(other, "an input of this run") for other in inputs]
        others += [(other, f"the output {name}") for name, other in outputs.items() if name != flag]
        for other, what in (*others, (work, "the folder of unfinished work (--work)")):
            if found := _overlap(path, other):
                raise InputError(f"{path}: {found} {other}, {what}; give another {flag}")
        if path.exists() and not (path.is_dir() if flag in folders else path.is_file()):
            there = "a folder" if path.is_dir() else "a file" if path.is_file() else "a device"
            wanted = "folder" if flag in folders else "file"
            raise InputError(
                f"{path}: is {there}, and {flag} is a {wanted}; give another {flag}, or remove it"
            )
        if _holds_something(path) and made_by(path) != stage:
            raise InputError(
                f"{path}: is there already, and {manifest(path)} does not say that stage {stage} "
                f"made it; give another {flag}, or remove it"
            )


def check_writable(path: Path) -> None:
    """InputError where no file or folder could be made at `path`."""
    folder = path.parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written: {folder} is not a writable folder")


@contextmanager
def claimed(stage: str, outputs: Collection[Path]) -> Iterator[None]:
    """Within the block, the manifest of an output that is not there yet names its stage: a run that
    is killed between an output and its manifest may replace it when it is run again. What killed
    ones left half-written is removed."""
    for path in outputs:
        for file in (path, manifest(path)):
            sweep(file)
        if not _holds_something(path):
            write_json(manifest(path), {"stage": stage})
    try:
        yield
    finally:
        for path in outputs:
            if not _holds_something(path):
                manifest(path).unlink(missing_ok=True)


def _overlap(path: Path, other: Path) -> str | None:
    """How `path` and `other` share files, if they do."""
    ours, theirs = path.resolve(), other.resolve()
    if ours == theirs:
        return "is"
    if theirs.is_relative_to(ours):
        return "contains"
    return "lies in" if ours.is_relative_to(theirs) else None


def _holds_something(path: Path) -> bool:
    """Whether there is anything to lose: not in an empty folder or file."""
    try:
        return any(path.iterdir()) if path.is_dir() else path.stat().st_size > 0
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
