"""Parquet tables and folders of shards, whose manifest is written last."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from entrograd.errors import InputError
from entrograd.storage import schemas
from entrograd.storage.files import atomic, atomic_folder, read_json, write_json
from entrograd.storage.hashing import sha256


class Provenance(TypedDict, total=False):
    """What a table says of its origin; which keys, its stage decides."""

    sampling: dict[str, Any]  # as section rollout.sampling
    engine: str
    annotate: dict[str, str]  # grader and model
    model: str
    policy_version: str
    chat_template_sha256: str | None
    seed: int
    dtype: str
    benchmark: str
    list_sha256: str
    problems: int
    prompt: dict[str, Any] | None  # section evaluate.benchmarks[].prompt
    n: int
    grader: str
    extraction: list[str]


ROWS = 8192  # made into Arrow at once
ROW_GROUP = 8 * ROWS  # rows of a file that are held until they are written
BUFFER = 1 << 20  # bytes of a Parquet column that are read together
MANIFEST = ".manifest.json"  # hidden: `datasets` and pyarrow open a folder of shards as it is


def write_table(
    path: Path | str,
    rows: Iterable[Mapping[str, object]] | pa.Table,
    name: str,
    **provenance: object,
) -> None:
    """Rows as a Parquet file of schema `name`; `provenance` goes to the file's metadata as JSON.

    The bytes depend on the rows and the provenance alone: give it nothing that varies between
    two equal runs.
    """
    schema = schemas.SCHEMAS[name]
    metadata = {
        "entrograd.table": name,
        "entrograd.version": schemas.VERSION,
        "entrograd.provenance": json.dumps(provenance, sort_keys=True),
    }
    schema = schema.with_metadata(metadata)
    tables = [rows] if isinstance(rows, pa.Table) else _row_groups(iter(rows), schema)
    first = 0
    with (
        atomic(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for table in tables:
            valid = schemas.validate(table, name, str(path), first)
            writer.write_table(valid.replace_schema_metadata(metadata))
            first += len(table)


def _row_groups(rows: Iterator[Mapping[str, object]], schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows as Arrow tables of ROW_GROUP rows, the last of what is left; one without rows if there
    are none. Only ROWS of them are Python objects at a time."""
    held = [schema.empty_table()]
    while part := [dict(row) for row in islice(rows, ROWS)]:
        if sum(map(len, held)) == ROW_GROUP:
            yield pa.concat_tables(held).combine_chunks()
            held = []
        held.append(pa.Table.from_pylist(part, schema=schema))
    yield pa.concat_tables(held).combine_chunks()


def read_table(path: Path | str, name: str) -> pa.Table:
    """The table in a Parquet file or in a folder of shards (by its manifest, or, made elsewhere,
    all *.parquet in name order), validated against schema `name`."""
    path = Path(path)
    if path.is_dir():
        files = shard_files(path)
        return pa.concat_tables(read_table(file, name) for file in files)
    with _readable(path, name):
        table = pq.read_table(path)
    return schemas.validate(table, name, str(path))


def read_batches(
    path: Path | str, name: str, rows: int, columns: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """The rows of `read_table`, in order, at most `rows` at a time: a row group of any size is not
    read whole. `columns`: only these."""
    path = Path(path)
    for file in shard_files(path) if path.is_dir() else [path]:
        first = 0
        with _readable(file, name), pq.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False) as f:
            schemas.validate(f.schema_arrow.empty_table(), name, str(file))
            known = columns and [column for column in columns if column in f.schema_arrow.names]
            for batch in f.iter_batches(rows, columns=known):
                table = pa.Table.from_batches([batch])
                yield schemas.validate(table, name, str(file), first, columns)
                first += len(table)


@contextmanager
def _readable(file: Path, name: str) -> Iterator[None]:
    """InputError where the block can't read `file`."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; it should hold a {name} table") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{file}: not a Parquet file: {error}") from None


def provenance(path: Path | str) -> Provenance:
    """What `write_table` was told of the table's origin ({} for tables made elsewhere)."""
    path = Path(path)
    if path.is_dir():
        path = shard_files(path)[0]
    metadata = pq.read_schema(path).metadata or {}
    value: Provenance = json.loads(metadata.get(b"entrograd.provenance", b"{}"))
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
