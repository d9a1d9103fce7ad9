"""The groups of a stored table, read when they are due: memory does not grow with the table.

The table is checked and copied once, a batch of rows at a time, into an uncompressed Arrow file,
of which any few rows can be read alone. In memory stays an index: which rows a group has.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from entrograd.annotate.reward_weights import head_values
from entrograd.data.groups import PromptGroup, groups_of
from entrograd.errors import InputError
from entrograd.storage.files import atomic
from entrograd.storage.schemas import SCHEMAS
from entrograd.storage.tables import read_batches

log = logging.getLogger("entrograd")

BATCH = 64  # rows that are read together
PART = 4096  # completions that a column is added to together
FILE = ".annotated.arrow"  # hidden: alone it is no work to go on with


class StoredGroups(Sequence[PromptGroup]):
    """The groups of an annotated table (a file, or a folder of shards), in order of first
    appearance; rows without tokens are left out.

    Args:
        path: the table.
        resume: the folder to copy it into.
        check: called with each part of the table and the number of its first row.

    Raises:
        InputError: the table is not one of schema `annotated`, has no rows or reward heads that
            differ, or a group has several prompts; when a group is read, a token column of another
            length than its tokens.
    """

    def __init__(self, path: Path, resume: Path, check: Callable[[pa.Table, int], None]) -> None:
        self.path, self.file = path, resume / FILE
        self.ratings: dict[str, Tensor] = {}  # of each reward head, [N] float64, rows in any order
        self.longest = 0  # tokens of a completion
        # Of each column added: its file, and the group's first value in it.
        self._added: dict[str, tuple[Path, array[int]]] = {}
        self._rows, self._ends = self._copy(check)
        self._source = pa.OSFile(str(self.file))
        self._batches = pa.ipc.open_file(self._source)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> PromptGroup:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = self._rows[self._ends[index - 1] if index else 0 : self._ends[index]]
        places = np.stack(np.divmod(rows, BATCH))
        parts = [
            pa.Table.from_batches([self._batches.get_batch(int(number))]).take(
                places[1, places[0] == number]
            )
            for number in dict.fromkeys(places[0].tolist())
        ]
        (group,) = groups_of(pa.concat_tables(parts), str(self.path))
        sizes = [len(completion) for completion in group.completions]
        for name, (file, first) in self._added.items():
            values = np.fromfile(file, np.float32, sum(sizes), offset=4 * first[index])
            for completion, own in zip(
                group.completions, np.split(values, np.cumsum(sizes)[:-1]), strict=True
            ):
                completion.tokens[name] = own
        return group

    def add(self, name: str, fill: Callable[[list[PromptGroup]], None]) -> None:
        """Add the token column `name`, float32: `fill` gives it to the completions of some groups
        at a time; it is stored beside the table."""
        file, first, count = self.file.with_name(f".{name}"), array("q", [0]), 0
        with atomic(file) as temporary, temporary.open("wb") as sink:
            for groups in self._in_parts():
                fill(groups)
                for group in groups:
                    for completion in group.completions:
                        sink.write(completion.tokens[name].astype(np.float32).tobytes())
                        count += len(completion)
                    first.append(count)
        self._added[name] = (file, first)

    def _in_parts(self) -> Iterator[list[PromptGroup]]:
        """All groups, in order, of about PART completions at a time."""
        part: list[PromptGroup] = []
        for group in self:
            part.append(group)
            if sum(map(len, part)) >= PART:
                yield part
                part = []
        if part:
            yield part

    @property
    def completions(self) -> int:
        """How many completions the groups have."""
        return len(self._rows)

    def _copy(self, check: Callable[[pa.Table, int], None]) -> tuple[np.ndarray, np.ndarray]:
        """Copy the table; the rows of all groups, one after another, and where each group ends."""
        numbers: dict[str, int] = {}  # of each group, by its prompt
        prompts = array("q")  # a hash of each group's prompt
        owners, rows = array("q"), array("q")  # of each row with tokens: its group and its number
        ratings: list[dict[str, Tensor]] = []
        first = 0
        with (
            atomic(self.file) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, SCHEMAS["annotated"]) as writer,
        ):
            for table in _batches(self.path):
                check(table, first)
                writer.write_table(table)
                lengths, own = (
                    pc.list_value_length(table[name]).to_numpy()
                    for name in ("completion_ids", "prompt_ids")
                )
                whole = np.flatnonzero((lengths > 0) & (own > 0))
                self.longest = max(self.longest, int(lengths[whole].max(initial=0)))
                ids = table["prompt_id"].to_pylist()
                tokens = table["prompt_ids"].combine_chunks()
                for row in whole.tolist():
                    key = hash(tokens[row].values.to_numpy().tobytes())
                    owner = numbers.setdefault(ids[row], len(numbers))
                    if owner == len(prompts):
                        prompts.append(key)
                    if prompts[owner] != key:
                        raise InputError(
                            f"{self.path}: row {first + row}: prompt_ids differ from those of the "
                            f"other rows of prompt {ids[row]}; give a prompt_id to each prompt"
                        )
                    owners.append(owner)
                    rows.append(first + row)
                names = ["prompt_id", "sample_index", "reward_heads"]
                if len(whole):
                    rated = head_values(table.select(names).take(whole).to_pylist(), str(self.path))
                    ratings.append(rated)
                    if list(rated) != list(ratings[0]):
                        raise InputError(
                            f"{self.path}: prompt {ids[whole[0]]} has the reward heads "
                            f"{list(rated)}, the first row {list(ratings[0])}; annotate all "
                            "rollouts with the same ones"
                        )
                first += len(table)
        if not first:
            raise InputError(f"{self.path}: no rows to train on")
        if first > len(rows):
            log.warning("%s: %d rows without tokens are left out", self.path, first - len(rows))
        if ratings:
            self.ratings = {name: torch.cat([r[name] for r in ratings]) for name in ratings[0]}
        groups = np.asarray(owners)
        order = np.argsort(groups, kind="stable")
        return np.asarray(rows)[order], np.cumsum(np.bincount(groups))


def _batches(path: Path) -> Iterator[pa.Table]:
    """The rows of a table of schema `annotated`, validated, BATCH at a time but for the last."""
    rest = SCHEMAS["annotated"].empty_table()
    for table in read_batches(path, "annotated", BATCH):
        rest = pa.concat_tables([rest, table])
        while len(rest) >= BATCH:
            yield rest[:BATCH].combine_chunks()
            rest = rest[BATCH:]
    if len(rest):
        yield rest.combine_chunks()
