"""Files appear whole or not at all: written beside their place, synced, renamed; a folder's
manifest is written last. Tables, shards, hashes and the run manifest."""

from __future__ import annotations

import csv
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from entrograd import schemas
from entrograd.errors import InputError

MANIFEST = ".manifest.json"  # hidden: `datasets` and pyarrow open a folder of shards as it is


# --- atomic writes ---------------------------------------------------------------------------


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


def _new_file(**where: Any) -> str:
    handle, name = tempfile.mkstemp(**where)
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


def write_json(path: Path | str, value: Any) -> None:
    """Indented JSON with sorted keys; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def write_csv(path: Path | str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a mapping; the columns are the union of all keys, in order of first sight."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
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


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return found


# --- tables ----------------------------------------------------------------------------------


def write_table(
    path: Path | str, rows: Sequence[Mapping[str, Any]] | pa.Table, name: str, **provenance: Any
) -> None:
    """Rows as a Parquet file of schema `name`; `provenance` goes to the file's metadata as JSON.

    The bytes depend on the rows and the provenance alone: give it nothing that varies between
    two equal runs.
    """
    schema = schemas.TABLES[name]
    if isinstance(rows, pa.Table):
        table = schemas.validate(rows, name, str(path))
    else:
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
        table = schemas.validate(table, name, str(path))
    metadata = {
        "entrograd.table": name,
        "entrograd.version": schemas.VERSION,
        "entrograd.provenance": json.dumps(provenance, sort_keys=True),
    }
    with atomic(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")


def read_table(path: Path | str, name: str) -> pa.Table:
    """The table in a Parquet file or in a folder of shards (by its manifest, or, made elsewhere,
    all *.parquet in name order), validated against schema `name`."""
    path = Path(path)
    if path.is_dir():
        files = shard_files(path)
        return pa.concat_tables(read_table(file, name) for file in files)
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; it should hold a {name} table") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a Parquet file: {error}") from None
    return schemas.validate(table, name, str(path))


def provenance(path: Path | str) -> dict[str, Any]:
    """What `write_table` was told of the table's origin ({} for tables made elsewhere)."""
    path = Path(path)
    if path.is_dir():
        path = shard_files(path)[0]
    metadata = pq.read_schema(path).metadata or {}
    value: dict[str, Any] = json.loads(metadata.get(b"entrograd.provenance", b"{}"))
    return value


def shard_name(index: int) -> str:
    """The file name of shard `index`."""
    return f"shard-{index:05d}.parquet"


def write_manifest(folder: Path | str) -> None:
    """Name every shard of a folder with its row count and sha256: the last file to be written."""
    folder = Path(folder)
    shards = [
        {"file": file.name, "rows": pq.read_metadata(file).num_rows, "sha256": sha256(file)}
        for file in sorted(folder.glob("*.parquet"))
    ]
    write_json(folder / MANIFEST, {"version": schemas.VERSION, "shards": shards})


def shard_files(folder: Path | str) -> list[Path]:
    """The shards of a folder, in order; InputError where one is absent or not as written."""
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        files = sorted(folder.glob("*.parquet"))
        if not files:
            raise InputError(f"{folder}: no {MANIFEST} and no *.parquet; give a folder of shards")
        return files
    listed = read_json(folder / MANIFEST)["shards"]
    for shard in listed:
        file = folder / shard["file"]
        if not file.exists() or sha256(file) != shard["sha256"]:
            raise InputError(f"{file}: absent or changed since {MANIFEST}; run its stage again")
    return [folder / shard["file"] for shard in listed]


def assemble(work: Path, out: Path, shards: Sequence[str]) -> None:
    """Make folder `out` of finished shards in `work`: linked or copied, manifest last, at once.

    `work` keeps its shards until its stage has ended, so a crash here loses nothing.
    """
    with atomic_folder(out) as folder:
        for shard in shards:
            try:
                os.link(work / shard, folder / shard)
            except OSError:  # another file system, or one without links
                shutil.copy2(work / shard, folder / shard)
        write_manifest(folder)


# --- hashes ----------------------------------------------------------------------------------


def sha256(path: Path | str) -> str:
    """The sha256 of a file, or of a folder: of its files' relative names and hashes."""
    path = Path(path)
    if path.is_dir():
        lines = [
            f"{file.relative_to(path).as_posix()} {sha256(file)}"
            for file in sorted(path.rglob("*"))
            if file.is_file()
        ]
        return text_hash("\n".join(lines))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(*parts: str) -> str:
    """The sha256 of strings, each closed by a zero byte so that no two lists collide."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def code_hash() -> str:
    """The sha256 of this package's source: resume state of other code is never continued."""
    root = Path(__file__).parent
    files: Iterable[Path] = sorted(root.rglob("*.py"))
    return text_hash(*(f"{file.relative_to(root)} {sha256(file)}" for file in files))
