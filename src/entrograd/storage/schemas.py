"""The Arrow schema of every table and what reading one guarantees.

Files are Parquet (zstd) with the schema's name and version, and the provenance of the table, in
the file's metadata. Plain pyarrow, DuckDB, Polars and `datasets` read them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from entrograd.errors import InputError
from entrograd.storage.columns import TABLES

VERSION = "1"

SCHEMAS = {
    name: pa.schema([column.field for column in columns]) for name, columns in TABLES.items()
}
# What stage annotate needs of a table made elsewhere; it fills in what is absent or null.
SCHEMAS["completions"] = pa.schema(
    field.with_nullable(field.name not in ("prompt_id", "completion_text"))
    for field in SCHEMAS["rollouts"]
)


def validate(
    table: pa.Table,
    name: str,
    where: str,
    first_row: int = 0,
    only: Sequence[str] | None = None,
) -> pa.Table:
    """`table` with exactly the columns of schema `name` (or `only` these of them), in order and
    type.

    Columns beyond the schema are dropped, absent nullable ones are filled with nulls; numbers, and
    the ways Arrow has to hold text and lists, are cast where no value changes. InputError names the
    file (`where`), the column, and for a bad value its row, `table` beginning at `first_row` of the
    file.
    """
    schema, columns = SCHEMAS[name], []
    if only is not None:
        schema = pa.schema(field for field in schema if field.name in only)
    for field in schema:
        if field.name not in table.column_names:
            if not field.nullable:
                raise InputError(
                    f"{where}: column {field.name} ({field.type}) is missing; a {name} table has "
                    f"{', '.join(schema.names)}"
                )
            columns.append(pa.nulls(table.num_rows, field.type))
            continue
        column = table.column(field.name)
        if column.type != field.type:
            wrong = f"{where}: column {field.name} is {column.type}, expected {field.type}"
            if not _same_kind(column.type, field.type):
                raise InputError(f"{wrong}; convert it")
            try:
                column = column.cast(field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise InputError(f"{wrong}: {error}") from None
        if not field.nullable and column.null_count:
            row = first_row + column.is_null().to_pylist().index(True)
            raise InputError(f"{where}: row {row}: {field.name} is null; give it a value")
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


def _same_kind(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether both are text, numbers, structs, or lists of one kind: Arrow would also cast numbers
    to text and back, and truth values to either."""
    of = pa.types
    if of.is_dictionary(found):
        return _same_kind(found.value_type, wanted)
    if of.is_null(found):
        return True
    for kinds in (
        (of.is_string, of.is_large_string, of.is_string_view, of.is_binary, of.is_large_binary),
        (of.is_integer, of.is_floating, of.is_decimal),
    ):
        if any(is_kind(wanted) for is_kind in kinds):
            return any(is_kind(found) for is_kind in kinds)
    if of.is_struct(wanted):
        known = {field.name: field.type for field in wanted}
        return of.is_struct(found) and all(
            _same_kind(field.type, known[field.name]) for field in found if field.name in known
        )
    listed = of.is_list(found) or of.is_large_list(found) or of.is_fixed_size_list(found)
    return listed and _same_kind(found.value_type, wanted.value_type)
