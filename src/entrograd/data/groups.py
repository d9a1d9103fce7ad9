"""Completions in memory: groups of one prompt, their tokens as numpy arrays.

Arrow is the form at rest, these are the form at work. They are grouped once and checked once, here;
from a table to a tensor no token becomes a Python object.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from entrograd.errors import InputError
from entrograd.storage.columns import TABLES, TOKEN_COLUMNS
from entrograd.storage.schemas import SCHEMAS


@dataclass(slots=True)
class Completion:
    """One completion of T tokens. What stage annotate adds is None before it.

    tokens: the token columns it has, by name, [T] each (storage/columns.py lists them).
    reward_heads: further ratings by name.
    """

    sample_index: int
    completion_ids: np.ndarray  # [T] int32
    completion_text: str
    finish_reason: str
    seed: int
    policy_version: str
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    answer: str | None = None
    extraction_rule: str | None = None
    reward: float | None = None
    reward_status: str | None = None
    reward_heads: dict[str, float] | None = None
    cluster_id: int | None = None

    def __len__(self) -> int:
        return len(self.completion_ids)


@dataclass(slots=True)
class PromptGroup:
    """The completions of one prompt."""

    prompt_id: str
    prompt_ids: np.ndarray  # [P] int32
    completions: list[Completion]

    def __len__(self) -> int:
        return len(self.completions)


def groups_of(table: pa.Table, where: str, first_row: int = 0) -> list[PromptGroup]:
    """The groups of a validated `rollouts` or `annotated` table, in order of first appearance.

    Token arrays are views of the table's buffers. InputError names the row of `where`, in
    which `table` begins at `first_row`, whose token column is not as long as its tokens, or whose
    prompt differs from its group's.
    """
    names = [name for name in TOKEN_COLUMNS if name in table.column_names]
    lists = {name: arrays_of(table[name]) for name in ("prompt_ids", "completion_ids", *names)}
    plain = {
        column.name: table[column.name].to_pylist()
        for column in TABLES["annotated"]
        if column.per != "token" and column.name in table.column_names and column.name not in lists
    }
    groups: dict[str, PromptGroup] = {}
    for row in range(table.num_rows):
        place = f"{where}: row {first_row + row}"
        prompt_ids, ids = lists["prompt_ids"][row], lists["completion_ids"][row]
        assert prompt_ids is not None
        assert ids is not None
        tokens = {name: values for name in names if (values := lists[name][row]) is not None}
        for name, values in tokens.items():
            if len(values) != len(ids):
                raise InputError(
                    f"{place}: {name} has {len(values)} values for {len(ids)} "
                    "completion tokens; annotate it again"
                )
        value = {name: values[row] for name, values in plain.items()}
        group = groups.setdefault(
            value["prompt_id"], PromptGroup(value["prompt_id"], prompt_ids, [])
        )
        if not np.array_equal(group.prompt_ids, prompt_ids):
            raise InputError(
                f"{place}: prompt_ids differ from those of the other rows of prompt "
                f"{group.prompt_id}; give each prompt a prompt_id of its own"
            )
        heads = value.pop("reward_heads", None)
        value.pop("prompt_id")
        group.completions.append(
            Completion(
                completion_ids=ids,
                tokens=tokens,
                reward_heads=None if heads is None else {h["name"]: h["value"] for h in heads},
                **value,
            )
        )
    return list(groups.values())


def table_of(groups: Iterable[PromptGroup], name: str) -> pa.Table:
    """A table of schema `name` (`rollouts` or `annotated`), one row per completion."""
    pairs = [(group, completion) for group in groups for completion in group.completions]
    columns = []
    for schema_field in SCHEMAS[name]:
        key = schema_field.name
        if key == "prompt_ids":
            columns.append(list_array([group.prompt_ids for group, _ in pairs], schema_field.type))
        elif key == "completion_ids":
            arrays = [completion.completion_ids for _, completion in pairs]
            columns.append(list_array(arrays, schema_field.type))
        elif key in TOKEN_COLUMNS:
            values = [completion.tokens.get(key) for _, completion in pairs]
            columns.append(list_array(values, schema_field.type))
        elif key == "prompt_id":
            columns.append(pa.array([group.prompt_id for group, _ in pairs], schema_field.type))
        elif key == "reward_heads":
            heads = [
                None
                if completion.reward_heads is None
                else [{"name": k, "value": v} for k, v in completion.reward_heads.items()]
                for _, completion in pairs
            ]
            columns.append(pa.array(heads, schema_field.type))
        else:
            plain = [getattr(completion, key) for _, completion in pairs]
            columns.append(pa.array(plain, schema_field.type))
    return pa.Table.from_arrays(columns, schema=SCHEMAS[name])


def arrays_of(column: pa.ChunkedArray) -> list[np.ndarray | None]:
    """The arrays of a list column, views of its buffer; None for null."""
    column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy(zero_copy_only=True)
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    return [
        values[start:end] if there else None
        for start, end, there in zip(offsets[:-1], offsets[1:], valid, strict=True)
    ]


def list_array(arrays: Sequence[np.ndarray | None], kind: pa.ListType) -> pa.Array:
    """A list column of type `kind` with these arrays; None is null."""
    sizes = [0 if array is None else len(array) for array in arrays]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    parts = [array for array in arrays if array is not None]
    dtype = kind.value_type.to_pandas_dtype()
    values = np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)
    missing = pa.array([array is None for array in arrays])
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(values, kind.value_type), type=kind, mask=missing
    )
