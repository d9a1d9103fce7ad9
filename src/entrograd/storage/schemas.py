"""The Arrow schema of every table and what reading one guarantees.

Files are Parquet (zstd) with the schema's name and version, and the provenance of the table, in
the file's metadata. Plain pyarrow, DuckDB, Polars and `datasets` read them as they are.
"""

from __future__ import annotations

import pyarrow as pa

from entrograd.errors import InputError

VERSION = "1"

_TEXT, _INT, _FLOAT = pa.string(), pa.int32(), pa.float32()
_MESSAGES = pa.list_(pa.struct([("role", _TEXT), ("content", _TEXT)]))

# split: train | heldout. Exactly one of messages (chat) and prompt_text (raw text) is set.
PROMPTS = pa.schema(
    [
        pa.field("prompt_id", _TEXT, nullable=False),
        pa.field("source", _TEXT, nullable=False),
        pa.field("split", _TEXT, nullable=False),
        pa.field("problem", _TEXT, nullable=False),
        pa.field("answers", pa.list_(_TEXT), nullable=False),
        pa.field("level", _TEXT),
        pa.field("messages", _MESSAGES),
        pa.field("prompt_text", _TEXT),
    ]
)

# Rows prepare turned away: where they stood (`line` of a text file), why, and their text.
REJECTS = pa.schema(
    [
        pa.field("source", _TEXT, nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("reason", _TEXT, nullable=False),
        pa.field("content", _TEXT),
        pa.field("line", pa.int64()),
    ]
)

# finish_reason: stop | length. policy_version: hash of the weights that sampled.
ROLLOUTS = pa.schema(
    [
        pa.field("prompt_id", _TEXT, nullable=False),
        pa.field("sample_index", _INT, nullable=False),
        pa.field("prompt_ids", pa.list_(_INT), nullable=False),
        pa.field("completion_ids", pa.list_(_INT), nullable=False),
        pa.field("completion_text", _TEXT, nullable=False),
        pa.field("sampling_logprobs", pa.list_(_FLOAT)),
        pa.field("finish_reason", _TEXT, nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("policy_version", _TEXT, nullable=False),
    ]
)

# What stage annotate needs of a table made elsewhere; it fills in what is absent or null.
COMPLETIONS = pa.schema(
    [field.with_nullable(field.name not in ("prompt_id", "completion_text")) for field in ROLLOUTS]
)

# extraction_rule found the answer (verify/extract.py).
# reward_status: ok | no_answer | timeout | truncated | error. Logprobs and entropies (nats) have
# one value a completion token; cluster_id is numbered within its group. token_scores are those of
# a token-level reward model, for tables of one's own: no stage fills them.
ANNOTATED = pa.schema(
    [
        *ROLLOUTS,
        pa.field("answer", _TEXT),
        pa.field("extraction_rule", _TEXT),
        pa.field("reward", _FLOAT, nullable=False),
        pa.field("reward_status", _TEXT, nullable=False),
        pa.field("reward_heads", pa.list_(pa.struct([("name", _TEXT), ("value", _FLOAT)]))),
        pa.field("old_logprobs", pa.list_(_FLOAT), nullable=False),
        pa.field("entropies", pa.list_(_FLOAT), nullable=False),
        pa.field("segment_ids", pa.list_(_INT)),
        pa.field("cluster_id", _INT, nullable=False),
        pa.field("token_scores", pa.list_(_FLOAT)),
    ]
)

# One row a prompt: the group's statistics. Semantic entropies in nats (methods.md, section 1).
GROUPS = pa.schema(
    [
        pa.field("prompt_id", _TEXT, nullable=False),
        pa.field("completions", _INT, nullable=False),
        pa.field("mean_reward", _FLOAT, nullable=False),
        pa.field("clusters", _INT, nullable=False),
        pa.field("semantic_entropy_rao", _FLOAT, nullable=False),
        pa.field("semantic_entropy_discrete", _FLOAT, nullable=False),
        pa.field("semantic_entropy_paper", _FLOAT, nullable=False),
        pa.field("mean_token_entropy", _FLOAT, nullable=False),
        pa.field("kernel_language_entropy", _FLOAT),
    ]
)

# One graded completion of an evaluation, kept so that every score can be looked into.
SAMPLES = pa.schema(
    [
        pa.field("model", _TEXT, nullable=False),
        pa.field("benchmark", _TEXT, nullable=False),
        pa.field("problem_id", _TEXT, nullable=False),
        pa.field("sample_index", _INT, nullable=False),
        pa.field("problem", _TEXT, nullable=False),
        pa.field("answers", pa.list_(_TEXT), nullable=False),
        pa.field("completion_text", _TEXT, nullable=False),
        pa.field("answer", _TEXT),
        pa.field("extraction_rule", _TEXT),
        pa.field("reward", _FLOAT, nullable=False),
        pa.field("reward_status", _TEXT, nullable=False),
        pa.field("finish_reason", _TEXT, nullable=False),
    ]
)

TABLES = {
    "prompts": PROMPTS,
    "rejects": REJECTS,
    "rollouts": ROLLOUTS,
    "completions": COMPLETIONS,
    "annotated": ANNOTATED,
    "groups": GROUPS,
    "samples": SAMPLES,
}


def validate(table: pa.Table, name: str, where: str, first_row: int = 0) -> pa.Table:
    """`table` with exactly the columns of schema `name`, in order and type.

    Columns beyond the schema are dropped, absent nullable ones are filled with nulls; numbers, and
    the ways Arrow has to hold text and lists, are cast where no value changes. InputError names the
    file (`where`), the column, and for a bad value its row, `table` beginning at `first_row` of the
    file.
    """
    schema, columns = TABLES[name], []
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
