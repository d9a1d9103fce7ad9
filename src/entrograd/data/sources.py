"""Rows of (problem, accepted answers, level) from generators, files and the hub.

What is wrong with a whole source is an InputError; what is wrong with one of its rows is a Reject
that says why.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from entrograd.data import tabular
from entrograd.data.params import FileSource, HubSource, ReasoningGymSource, Source
from entrograd.errors import InputError, extra


@dataclass(frozen=True, slots=True)
class Row:
    """One problem; `row` and `line` are its tabular.Place."""

    source: str
    row: int
    problem: str
    answers: tuple[str, ...]
    level: str | None
    line: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Reject:
    """A row turned away, and why."""

    source: str
    row: int
    reason: str
    content: str
    line: int | None = field(default=None, compare=False)


def place(item: Row | Reject) -> str:
    """Where a row stands, for messages: `mine.csv row 2 (line 3)`."""
    return f"{item.source} {tabular.Place(item.row, item.line)}"


def name_of(source: Source) -> str:
    """What the tables call a source: its task, its file's name or its name on the hub."""
    if isinstance(source, ReasoningGymSource):
        return source.task
    return Path(source.path).name if isinstance(source, FileSource) else source.name


def read(source: Source, name: str | None = None) -> tuple[list[Row], list[Reject]]:
    """All rows of a source, in its order, each kept or rejected; `name` replaces its own.

    Raises InputError if the source as a whole can't be read: an unknown task, a missing, empty
    or non-UTF-8 file, a column that is missing or of the wrong type, no network for the hub.
    """
    name = name or name_of(source)
    columns = source.problem, "answer", None
    if isinstance(source, ReasoningGymSource):
        from entrograd.data.generated import generate

        records: Iterable[tabular.Record] = tabular.numbered(generate(source))
    else:
        columns = source.problem, source.answer, source.level  # type: ignore[assignment]
        wanted = [column for column in columns if column is not None]
        if isinstance(source, FileSource):
            records = tabular.read_records(source.path, wanted, texts=[source.problem])
        else:
            records = _hub_records(source, wanted)
        records = islice(records, source.limit)
    keep = source.keep if isinstance(source, ReasoningGymSource) else None
    rows: list[Row] = []
    rejects: list[Reject] = []
    for at, record in records:
        taken = _take(name, at, record, *columns)
        if isinstance(taken, Reject):
            rejects.append(taken)
        elif keep is None or re.fullmatch(keep, taken.problem):
            rows.append(taken)
    if not rows and not rejects:
        which = f" whose problem matches keep: {keep}" if keep else ""
        raise InputError(f"{name}: no rows{which}; give a source that has some")
    return rows, rejects


def read_problems(path: Path | str, column: str = "problem") -> list[str]:
    """The problems of a benchmark or training file, by its column alone.

    Raises InputError as `read` does, and for any row without a problem: against a
    list that can't be read whole there is no guarding.
    """
    problems = []
    for at, record in tabular.read_records(path, [column], texts=[column]):
        if isinstance(record, tabular.Malformed):
            raise InputError(f"{path}: {at}: {record.reason}: {record.content[:80]!r}")
        problem, reason = _problem(record.get(column))
        if reason:
            raise InputError(f"{path}: {at}: {reason} (column {column}); fix or remove it")
        problems.append(problem)
    if not problems:
        raise InputError(f"{path}: no rows; give a file that has some")
    return problems


# --- one row ---------------------------------------------------------------------------------


def _take(
    source: str,
    at: tabular.Place,
    record: tabular.Malformed | Mapping[str, object],
    problem_at: str,
    answer_at: str,
    level_at: str | None,
) -> Row | Reject:
    if isinstance(record, tabular.Malformed):
        return Reject(source, at.row, record.reason, record.content, at.line)
    problem, reason = _problem(_at(record, problem_at))
    answers, why = accepted_answers(record.get(answer_at))
    reason = reason or why
    if reason:
        return Reject(source, at.row, reason, tabular.shown(record), at.line)
    value = record.get(level_at) if level_at else None
    level = None if value is None else _number_or_text(value)
    return Row(source, at.row, problem, answers, level, at.line)


def _problem(value: object) -> tuple[str, str | None]:
    """A problem's text, or why it is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return "", "missing problem"
    if not isinstance(value, str):
        return "", "problem is not text"
    return (value, None) if _encodable(value) else ("", "problem is not valid Unicode")


def accepted_answers(value: object) -> tuple[tuple[str, ...], str | None]:
    """The accepted answers, or why there are none."""
    items = value if isinstance(value, list | tuple) else [value]
    if not items or any(item is None or item == "" for item in items):
        return (), "missing answer"
    if any(isinstance(item, bool) or not isinstance(item, str | int | float) for item in items):
        return (), "answer is not text, a number or a list of them"
    if any(isinstance(item, float) and not math.isfinite(item) for item in items):
        return (), "answer is not finite"
    answers = tuple(dict.fromkeys(_number_or_text(item).strip() for item in items))
    if not all(answers):
        return (), "missing answer"
    return (answers, None) if all(map(_encodable, answers)) else ((), "answer is not valid Unicode")


def _number_or_text(value: object) -> str:
    """A value as text; 18.0 is 18, as files that know one number type write integers."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, written as an escape
        return False
    return True


def _at(record: Mapping[str, object], path: str) -> object:
    """The value at a column, or at a dotted path into nested mappings."""
    if path in record:
        return record[path]
    value: object = record
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


# --- the hub ---------------------------------------------------------------------------------


def _hub_records(source: HubSource, wanted: list[str]) -> tabular.Records:
    with extra("data"):
        import datasets

    asked = f"{source.name}@{source.revision}, split {source.split}"
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(
            source.name, source.subset, split=source.split, revision=source.revision
        )
    except Exception as error:  # the client raises many unrelated types: HTTP, cache, format
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        said = str(error).splitlines()[0] if str(error) else ""
        raise InputError(
            f"hub data set {asked}: neither reachable nor in the local cache{offline} "
            f"({type(error).__name__}: {said}); check name, revision and network, or download it "
            "elsewhere and name it as a source of kind file"
        ) from error
    tabular.check_columns(table.features.arrow_schema, f"hub data set {asked}", wanted, [wanted[0]])
    return tabular.numbered(table)
