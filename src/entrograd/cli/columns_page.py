"""docs/columns.md: `python -m entrograd.cli.columns_page` writes it from the registry."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa

from entrograd.storage.columns import REF_LOGPROBS, TABLES, Column
from entrograd.storage.files import write_text

PAGE = Path("docs/columns.md")


def document() -> str:
    """docs/columns.md."""
    parts = [_HEAD]
    for name, columns in TABLES.items():
        parts += ["", f"## {name}", "", _PLACES[name], "", *_HEADER]
        parts += [_line(column) for column in columns]
    parts += ["", "## Of a batch alone", "", _COMPUTED, "", *_HEADER, _line(REF_LOGPROBS)]
    return "\n".join(parts) + "\n"


def _line(column: Column) -> str:
    kind = _shown(column.field.type) + (" or null" if column.optional else "")
    return (
        f"| `{column.name}` | {column.per} | {kind} | {column.unit} | {column.writer} "
        f"| {column.meaning} |"
    )


def _shown(kind: pa.DataType) -> str:
    """An Arrow type in words: `list of int32`."""
    if pa.types.is_list(kind):
        return f"list of {_shown(kind.value_type)}"
    if pa.types.is_struct(kind):
        return "{" + ", ".join(f"{field.name}: {_shown(field.type)}" for field in kind) + "}"
    return {"string": "text", "float": "float32"}.get(str(kind), str(kind))


_HEAD = """\
# Columns

<!-- python -m entrograd.cli.columns_page writes this page from src/entrograd/storage/columns.py -->

Every table is Parquet. `per` says what has one value of a column; one per token is a list along
`completion_ids`. A column that may be null may be absent from a table of yours; columns that are
not listed here are dropped when a table is read."""

_HEADER = ("| column | per | type | unit | written by | is |", "|---|---|---|---|---|---|")

_PLACES = {
    "prompts": "`data/prompts.parquet`: one row per problem.",
    "rejects": "`data/rejects.parquet`: one row per rejected row of a source.",
    "rollouts": "`data/rollouts`: one row per completion.",
    "annotated": "`data/annotated`: the rollouts and what was measured of them.",
    "groups": "`data/groups.parquet`: one row per group of completions of one prompt.",
    "samples": "`data/samples`: one row per graded completion.",
}

_COMPUTED = "Not stored: training adds it to the groups it reads."


if __name__ == "__main__":
    write_text(PAGE, document())
    sys.exit(0)
