"""Files appear whole or not at all: written beside their place, synced, renamed."""

from __future__ import annotations

import csv
import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from entrograd.errors import InputError


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """A temporary file beside `path`, renamed onto it when the block ends without an error.
    InputError where it cannot be written."""
    with _temporary(Path(path), _new_file) as temporary:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed onto it (replacing it) when the block ends.
    InputError where it cannot be written."""
    with _temporary(Path(path), tempfile.mkdtemp) as temporary:
        yield temporary
        for part in temporary.rglob("*"):
            _sync(part)
        temporary.chmod(0o777 & ~_umask())
        remove_folder(Path(path))
        temporary.replace(path)


@contextmanager
def _temporary(path: Path, make: Callable[..., str]) -> Iterator[Path]:
    """What `make` makes beside `path`, locked; the block renames it, or it is removed."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(make(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        with _lock(temporary):
            yield temporary
        _sync(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        if temporary is not None:
            _remove(temporary)


def _new_file(prefix: str, suffix: str, dir: Path) -> str:
    handle, name = tempfile.mkstemp(suffix, prefix, dir)
    os.close(handle)
    return name


def sweep(path: Path) -> None:
    """Remove the temporary files and folders of `path` that a killed process left. A lock says
    that its process lives, on whatever machine; where locks are unknown nothing is removed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):  # tempfile's names
        with suppress(FileNotFoundError), _lock(left) as locked:
            if locked:
                _remove(left)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Whether `path` could be locked: until the block, or this process, ends."""
    handle = os.open(path, os.O_RDONLY)
    try:
        locked = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process has it, or the file system knows no locks
            locked = False
        yield locked
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Make a folder disappear at once (one killed half-way leaves `.NAME.removed`), if there is
    one."""
    gone = path.with_name(f".{path.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):
        path.replace(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# A disk, quota or file-size limit that is reached.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def _unwritable(path: Path, error: OSError) -> Exception:
    """InputError naming `path` and what the system says; the error as it is where it is a
    library's, or of a file that code looks for in vain."""
    if error.errno in (None, errno.ENOENT):
        return error
    remedy = "; make room and run again" if error.errno in _FULL else ""
    return InputError(f"{path}: cannot be written: {os.strerror(error.errno)}{remedy}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path | str, text: str) -> None:
    """UTF-8 text, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: object) -> None:
    """Indented JSON with sorted keys; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def append_text(path: Path, text: str) -> None:
    """UTF-8 text at the end of a file that others may be reading; InputError where it cannot be
    written."""
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise _unwritable(path, error) from None


def write_csv(
    path: Path | str, rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None
) -> None:
    """One line per mapping; without `columns` they are the union of all keys, in order of first
    sight."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: Path | str) -> Any:
    """The JSON value in a file, in UTF-8 with or without a byte-order mark; InputError names the
    file where it is absent or malformed, and the key where an object has it twice."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_distinct)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"{path}: not JSON: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None


def _distinct(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return found
