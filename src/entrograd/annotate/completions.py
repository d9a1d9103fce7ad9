"""Completions from Parquet files, a bounded piece of whole groups at a time, and what tables made
elsewhere leave out: tokens, sample numbers, how a completion ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from entrograd.data.groups import arrays_of, list_array
from entrograd.data.prompt import PromptRow, Tokenizer, encode
from entrograd.errors import InputError
from entrograd.storage import schemas
from entrograd.storage.tables import read_table

# A piece is closed behind the group that reaches one of these; it bounds what is held in memory.
PIECE_ROWS = 4096
PIECE_TOKENS = 1 << 18
_BYTES_PER_TOKEN = 4  # where only text is known
_READ_ROWS = 512


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one file, whole groups: what becomes one shard."""

    file: Path
    rows: int
    first_row: int  # of the file


class Prompts(Mapping[str, PromptRow]):
    """prompt_id -> its row of the prompts table, which stays in Arrow's form."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._table = read_table(path, "prompts").combine_chunks()
        self._rows = {name: row for row, name in enumerate(self._table["prompt_id"].to_pylist())}

    def __getitem__(self, prompt_id: str) -> PromptRow:
        row: PromptRow = self._table.slice(self._rows[prompt_id], 1).to_pylist()[0]
        return row

    def __contains__(self, prompt_id: object) -> bool:
        return prompt_id in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def plan(files: Sequence[Path], prompts: Prompts) -> list[Piece]:
    """The pieces of all files, in order. A file of scattered groups is cut where none is open.

    InputError names an unknown prompt, a group that stands in two files, or an empty table.
    """
    home: dict[str, Path] = {}
    pieces: list[Piece] = []
    for file in files:
        names, tokens = _columns(file)
        last = {name: row for row, name in enumerate(names)}
        for name in last:
            if name not in prompts:
                raise InputError(
                    f"{file}: prompt_id {name} is not in {prompts.path}; give the prompts table "
                    "these rollouts were drawn from"
                )
            if home.setdefault(name, file) != file:
                raise InputError(
                    f"{file}: prompt_id {name} is also in {home[name].name}; keep a group in one "
                    "shard"
                )
        start = held = until = 0
        for row, name in enumerate(names):
            held += tokens[row]
            until = max(until, last[name])
            full = row + 1 - start >= PIECE_ROWS or held >= PIECE_TOKENS
            if row + 1 == len(names) or (full and row == until):
                pieces.append(Piece(file, row + 1 - start, start))
                start, held = row + 1, 0
    if not pieces:
        raise InputError(f"{files[0]}: no rows; there is nothing to annotate")
    return pieces


class PieceReader:
    """The pieces of `plan` by number. Ascending numbers read each file once, a batch at a time."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._file: Path | None = None  # open, standing before the piece `_next`
        self._next = 0
        self._batches: Iterator[pa.Table] = iter(())
        self._waiting: list[pa.Table] = []

    def read(self, number: int) -> pa.Table:
        """A piece, in schema `completions`."""
        piece = self._pieces[number]
        if self._file != piece.file or self._next > number:
            self._next = next(i for i, p in enumerate(self._pieces) if p.file == piece.file)
            self._file, self._batches, self._waiting = piece.file, _batches(piece.file), []
        for passed in self._pieces[self._next : number]:
            self._take(passed.rows)
        table = self._take(piece.rows)
        self._next = number + 1
        return schemas.validate(table, "completions", str(piece.file), piece.first_row)

    def _take(self, count: int) -> pa.Table:
        while sum(table.num_rows for table in self._waiting) < count:
            self._waiting.append(next(self._batches))
        table = pa.concat_tables(self._waiting)
        self._waiting = [table.slice(count)]
        return table.slice(0, count)


def complete(
    table: pa.Table, prompts: Mapping[str, PromptRow], tokenizer: Tokenizer | None
) -> pa.Table:
    """A table of schema `rollouts` from one of `completions`: what is absent is filled in.

    - prompt_ids: the prompt of the prompts table, as stage rollout gives it to this model.
    - completion_ids: the text on its own, as sampling would have continued the prompt; if the
      completion is finished and does not end so, the end-of-sequence token follows.
    - finish_reason `stop`, sample_index by order in the group, seed 0, policy_version `unknown`.

    `tokenizer` may be None unless `lacks_tokens`. InputError names the prompt that has no text, or
    the group that numbers only some samples.
    """
    defaults = {"finish_reason": "stop", "seed": 0, "policy_version": "unknown"}
    columns = {name: pc.fill_null(table[name], value) for name, value in defaults.items()}
    columns["sample_index"] = _sample_indexes(table)
    if lacks_tokens(table):
        assert tokenizer is not None
        columns["prompt_ids"] = _prompt_ids(table, prompts, tokenizer)
        columns["completion_ids"] = _completion_ids(table, columns["finish_reason"], tokenizer)
    schema = schemas.SCHEMAS["rollouts"]
    return pa.table([columns.get(name, table[name]) for name in schema.names], schema=schema)


def lacks_tokens(table: pa.Table) -> bool:
    """Whether `complete` needs a tokenizer."""
    return bool(table["prompt_ids"].null_count or table["completion_ids"].null_count)


def _sample_indexes(table: pa.Table) -> pa.ChunkedArray | pa.Array:
    column = table["sample_index"]
    if not column.null_count:
        return column
    names = table["prompt_id"].to_pylist()
    sizes, numbered = (
        Counter(names),
        Counter(table.filter(column.is_valid())["prompt_id"].to_pylist()),
    )
    for name, size in sizes.items():
        if 0 < numbered[name] < size:
            raise InputError(
                f"prompt_id {name}: {size - numbered[name]} of {size} rows have no sample_index; "
                "number all of a group's completions, or none"
            )
    seen: Counter[str] = Counter()
    values = []
    for name, index in zip(names, column.to_pylist(), strict=True):
        values.append(seen[name] if index is None else index)
        seen[name] += 1
    return pa.array(values, column.type)


def _prompt_ids(
    table: pa.Table, prompts: Mapping[str, PromptRow], tokenizer: Tokenizer
) -> pa.Array:
    encoded: dict[str, np.ndarray] = {}
    arrays = arrays_of(table["prompt_ids"])
    for row, name in enumerate(table["prompt_id"].to_pylist()):
        if arrays[row] is None:
            if name not in encoded:
                encoded[name] = np.array(encode(prompts[name], tokenizer), np.int32)
            arrays[row] = encoded[name]
    return list_array(arrays, table["prompt_ids"].type)


def _completion_ids(table: pa.Table, reasons: pa.ChunkedArray, tokenizer: Tokenizer) -> pa.Array:
    arrays = arrays_of(table["completion_ids"])
    texts, reasons = table["completion_text"].to_pylist(), reasons.to_pylist()
    end = tokenizer.eos_token_id
    assert end is not None
    for row, (text, reason) in enumerate(zip(texts, reasons, strict=True)):
        if arrays[row] is None:
            ids = tokenizer.encode(text, add_special_tokens=False)
            if reason == "stop" and ids[-1:] != [end]:
                ids = [*ids, end]
            arrays[row] = np.array(ids, np.int32)
    return list_array(arrays, table["completion_ids"].type)


def _batches(file: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The file, some rows at a time: a row group of any size is not read whole."""
    with pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as source:
        if columns is not None:
            columns = [name for name in columns if name in source.schema_arrow.names]
        for batch in source.iter_batches(_READ_ROWS, columns=columns):
            yield pa.Table.from_batches([batch])


def _columns(file: Path) -> tuple[list[str], list[int]]:
    """prompt_id and about how many tokens each row has."""
    names: list[str] = []
    sizes: list[int] = []
    measured = ("prompt_ids", "completion_ids", "completion_text")
    try:
        for table in _batches(file, ["prompt_id", *measured]):
            table = schemas.validate(table, "completions", str(file), len(names))
            names += table["prompt_id"].to_pylist()
            text = pc.divide(pc.binary_length(table["completion_text"]), _BYTES_PER_TOKEN)
            tokens = pc.coalesce(pc.list_value_length(table["completion_ids"]), text)
            prompt = pc.coalesce(pc.list_value_length(table["prompt_ids"]), 0)
            sizes += pc.add(tokens, prompt).to_pylist()
    except (pa.ArrowInvalid, OSError):  # reading it as a table says what is wrong
        read_table(file, "completions")
        raise
    return names, sizes
