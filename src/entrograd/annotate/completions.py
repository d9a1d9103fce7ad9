"""Completions from Parquet files, a bounded piece of whole groups at a time, and what tables made
elsewhere leave out: tokens, sample numbers, how a completion ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from entrograd.data.prompt import encode
from entrograd.errors import InputError
from entrograd.storage import schemas
from entrograd.storage.tables import read_table

Rows = list[dict[str, Any]]

# A piece is closed behind the group that reaches one of these; it bounds what is held in memory.
PIECE_ROWS = 4096
PIECE_TOKENS = 1 << 18
_BYTES_A_TOKEN = 4  # where only text is known
_READ_ROWS = 512


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one file, whole groups: what becomes one shard."""

    file: Path
    rows: int


class Prompts(Mapping[str, dict[str, Any]]):
    """prompt_id -> its row of the prompts table, which stays in Arrow's form."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._table = read_table(path, "prompts").combine_chunks()
        self._rows = {name: row for row, name in enumerate(self._table["prompt_id"].to_pylist())}

    def __getitem__(self, prompt_id: str) -> dict[str, Any]:
        row: dict[str, Any] = self._table.slice(self._rows[prompt_id], 1).to_pylist()[0]
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
                pieces.append(Piece(file, row + 1 - start))
                start, held = row + 1, 0
    if not pieces:
        raise InputError(f"{files[0]}: no rows; there is nothing to annotate")
    return pieces


class PieceReader:
    """The pieces of `plan` by number. Ascending numbers read each file once, a batch at a time."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._file: Path | None = None  # open, standing before the piece `_next`, at row `_row`
        self._next = self._row = 0
        self._batches: Iterator[pa.Table] = iter(())
        self._waiting: list[pa.Table] = []

    def read(self, number: int) -> Rows:
        """The rows of a piece, in schema `completions`."""
        file = self._pieces[number].file
        if self._file != file or self._next > number:
            self._next = next(i for i, piece in enumerate(self._pieces) if piece.file == file)
            self._file, self._row, self._batches, self._waiting = file, 0, _batches(file), []
        for piece in self._pieces[self._next : number]:
            self._take(piece.rows)
        row, table = self._row, self._take(self._pieces[number].rows)
        self._next = number + 1
        rows: Rows = schemas.validate(table, "completions", str(file), row).to_pylist()
        return rows

    def _take(self, count: int) -> pa.Table:
        while sum(table.num_rows for table in self._waiting) < count:
            self._waiting.append(next(self._batches))
        table = pa.concat_tables(self._waiting)
        self._waiting = [table.slice(count)]
        self._row += count
        return table.slice(0, count)


def complete(rows: Rows, prompts: Mapping[str, Mapping[str, Any]], tokenizer: Any) -> Rows:
    """Rows of schema `rollouts` from rows of `completions`: what is absent is filled in.

    - prompt_ids: the prompt of the prompts table, as stage rollout gives it to this model.
    - completion_ids: the text on its own, as sampling would have continued the prompt; where the
      completion is finished and does not end so, the end-of-sequence token follows.
    - finish_reason `stop`, sample_index by order in the group, seed 0, policy_version `unknown`.

    InputError names the prompt that has no text, or the group that numbers only some samples.
    """
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    for name, members in groups.items():
        unnumbered = [row for row in members if row["sample_index"] is None]
        if unnumbered and len(unnumbered) < len(members):
            raise InputError(
                f"prompt_id {name}: {len(unnumbered)} of {len(members)} rows have no sample_index; "
                "number all of a group's completions, or none"
            )
        for number, row in enumerate(unnumbered):
            row["sample_index"] = number
        if any(row["prompt_ids"] is None for row in members):
            ids = encode(prompts[name], tokenizer)
            for row in members:
                row["prompt_ids"] = ids if row["prompt_ids"] is None else row["prompt_ids"]
    defaults = {"finish_reason": "stop", "seed": 0, "policy_version": "unknown"}
    for row in rows:
        row.update({key: value for key, value in defaults.items() if row[key] is None})
        if row["completion_ids"] is None:
            row["completion_ids"] = _tokens(row, tokenizer)
    return rows


def lacks_tokens(rows: Rows) -> bool:
    """Whether `complete` needs a tokenizer."""
    return any(row["prompt_ids"] is None or row["completion_ids"] is None for row in rows)


def _tokens(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    ids = [int(i) for i in tokenizer.encode(row["completion_text"], add_special_tokens=False)]
    end = tokenizer.eos_token_id
    if row["finish_reason"] == "stop" and ids[-1:] != [end]:
        ids.append(int(end))
    return ids


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
            text = pc.divide(pc.binary_length(table["completion_text"]), _BYTES_A_TOKEN)
            tokens = pc.coalesce(pc.list_value_length(table["completion_ids"]), text)
            prompt = pc.coalesce(pc.list_value_length(table["prompt_ids"]), 0)
            sizes += pc.add(tokens, prompt).to_pylist()
    except (pa.ArrowInvalid, OSError):  # reading it as a table says what is wrong
        read_table(file, "completions")
        raise
    return names, sizes
