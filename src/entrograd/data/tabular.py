"""Records of JSONL, CSV and Parquet files, each with its place."""

from __future__ import annotations

import csv
import io as streams
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from entrograd.errors import InputError

SHOWN = 2000  # characters kept of a rejected record


class Place(NamedTuple):
    """Where a record stands. Rows count from 1: lines in a JSONL file, records in others, in CSV
    without the header and blank lines. `line` is the one a record of a text file begins on."""

    row: int
    line: int | None = None

    def __str__(self) -> str:
        """`row 2 (line 3)`, or `row 2` if there are no lines or both are the same."""
        same = self.line in (None, self.row)
        return f"row {self.row}" if same else f"row {self.row} (line {self.line})"


@dataclass(frozen=True)
class Malformed:
    """A record that can't be parsed."""

    reason: str
    content: str


Record = tuple[Place, Malformed | Mapping[str, object]]
Records = Iterator[Record]


def read_records(path: Path | str, wanted: Sequence[str], texts: Sequence[str]) -> Records:
    """(place, record) for each record of a file, a mapping of columns or Malformed.

    Args:
        path: a .jsonl, .ndjson, .csv or .parquet file.
        wanted: columns it must have; a JSONL file must have each in at least one record.
        texts: those of them that must be text if the file types its columns.

    Raises InputError, before the first record, if the file is missing, empty, of another kind,
    not UTF-8, or lacks a wanted column.
    """
    path = Path(path)
    kinds: dict[str, Callable[[Path, Sequence[str], Sequence[str]], Records]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    if path.suffix.lower() not in kinds:
        raise InputError(f"{path}: expected a file ending in {', '.join(kinds)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    return kinds[path.suffix.lower()](path, wanted, texts)


def numbered(records: Iterable[Mapping[str, object]]) -> Records:
    """Records that have no lines."""
    return ((Place(number), record) for number, record in enumerate(records, start=1))


def shown(record: object) -> str:
    """A record as one line of text, cut to a length that can be stored and printed."""
    if not isinstance(record, str):
        record = json.dumps(record, ensure_ascii=False, default=str)
    return record[:SHOWN].encode("utf-8", "replace").decode("utf-8")


def check_columns(
    schema: pa.Schema, where: str, wanted: Sequence[str], texts: Sequence[str]
) -> None:
    """InputError if a wanted column is missing, or one of `texts` is not text."""
    _check_names(schema.names, where, wanted)
    for name in texts:
        kind = schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise InputError(f"{where}: column {name} is {kind}, expected text")


def _check_names(names: Sequence[str], where: str, wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise InputError(
            f"{where}: no column {', '.join(missing)}; it has {', '.join(names) or 'none'}"
        )


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}: line {line}: byte {content[error.start]:#04x} is not UTF-8; convert the file"
        ) from None


def _jsonl(path: Path, wanted: Sequence[str], texts: Sequence[str]) -> Records:  # noqa: ARG001
    """Read twice: the columns are those of all rows, and rows are given one by one."""
    names: dict[str, None] = {}
    objects = count = 0
    for _, line in _lines(path):
        count += 1
        if isinstance(record := _parse(line), dict):
            objects += 1
            names.update(dict.fromkeys(record))
    if not count:
        raise InputError(f"{path}: the file is empty")
    if objects:
        _check_names(list(names), str(path), wanted)
    return ((Place(number, number), _parse(line)) for number, line in _lines(path))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, numbered from 1."""
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.removesuffix("\n")
    except UnicodeDecodeError:
        _text(path)  # says where
        raise


def _parse(line: str) -> dict[str, object] | Malformed:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return Malformed("malformed JSON", shown(line))
    return record if isinstance(record, dict) else Malformed("not a JSON object", shown(line))


def _csv(path: Path, wanted: Sequence[str], texts: Sequence[str]) -> Records:  # noqa: ARG001
    reader = csv.reader(streams.StringIO(_text(path), newline=""), strict=True)
    begins, lines = 1, []
    try:
        for row in reader:
            if row:
                lines.append((begins, row))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: not CSV: {error}") from None
    (_, header), *rows = lines or [(1, [])]
    _check_names(header, str(path), wanted)
    return (
        (Place(number, line), _fields(header, row))
        for number, (line, row) in enumerate(rows, start=1)
    )


def _fields(header: list[str], row: list[str]) -> dict[str, str] | Malformed:
    if len(row) != len(header):
        return Malformed(f"{len(row)} fields, expected {len(header)}", shown(",".join(row)))
    return dict(zip(header, row, strict=True))


def _parquet(path: Path, wanted: Sequence[str], texts: Sequence[str]) -> Records:
    try:
        file = pq.ParquetFile(path)
        check_columns(file.schema_arrow, str(path), wanted, texts)
        table = file.read(columns=list(dict.fromkeys(wanted)))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file: {error}") from None
    return numbered(table.to_pylist())
