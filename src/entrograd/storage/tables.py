"""Parquet tables and folders of shards, whose manifest is written last."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
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


ROWS = 10_000  # made into Arrow at once
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
    if isinstance(rows, pa.Table):
        table = schemas.validate(rows, name, str(path))
    else:
        table = schemas.validate(_table(rows, schema), name, str(path))
    metadata = {
        "entrograd.table": name,
        "entrograd.version": schemas.VERSION,
        "entrograd.provenance": json.dumps(provenance, sort_keys=True),
    }
    with atomic(path) as temporary:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")


def _table(rows: Iterable[Mapping[str, object]], schema: pa.Schema) -> pa.Table:
    """Rows as an Arrow table; only ROWS of them are Python objects at a time."""
    rows, parts = iter(rows), [schema.empty_table()]
    while part := [dict(row) for row in islice(rows, ROWS)]:
        parts.append(pa.Table.from_pylist(part, schema=schema))
    return pa.concat_tables(parts).combine_chunks()


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
