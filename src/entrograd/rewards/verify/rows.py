"""Grading of a JSONL file, a batch of lines at a time: memory does not grow with the file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from entrograd.data.sources import accepted_answers
from entrograd.errors import InputError
from entrograd.rewards.verify.grade import Grade, Grader, Item

_BATCH_ROWS = 1024
_BATCH_BYTES = 8 << 20

Row = dict[str, Any]


def grade_file(path: Path | str, grader: Grader) -> Iterator[Row]:
    """The rows of a JSONL file, in order, each with its grade added.

    A row has `answer` (a string or number, or a list of accepted ones) and `completion`, or
    `completions`, a list; optionally `finish_reason` (stop or length, a list beside
    `completions`). Added are `reward`, `extracted`, `reward_status` and `extraction_rule`, lists
    if the row has `completions`. InputError names the line that cannot be graded.
    """
    for batch in batches(Path(path)):
        items = [_items(row, f"{path}: line {number}") for number, row in batch]
        grades = iter(grader.grade([item for of_row in items for item in of_row]))
        for (_, row), of_row in zip(batch, items, strict=True):
            yield row | _columns([next(grades) for _ in of_row], "completions" in row)


def _columns(grades: Sequence[Grade], several: bool) -> Row:
    columns: dict[str, list[Any]] = {
        "reward": [grade.reward for grade in grades],
        "extracted": [grade.answer for grade in grades],
        "reward_status": [grade.status for grade in grades],
        "extraction_rule": [grade.rule for grade in grades],
    }
    return columns if several else {name: values[0] for name, values in columns.items()}


def batches(path: Path) -> Iterator[list[tuple[int, Row]]]:
    """The rows of a JSONL file with their line numbers, some at a time. InputError names a line
    that is not a JSON object."""
    batch: list[tuple[int, Row]] = []
    size = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                batch.append((number, _parse(line, f"{path}: line {number}")))
                size += len(line)
                if len(batch) == _BATCH_ROWS or size > _BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; give a JSONL file") from None
    if batch:
        yield batch


def _parse(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON in UTF-8 ({error}); fix or remove it") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object; write one row per line")
    return row


def _items(row: Mapping[str, object], where: str) -> list[Item]:
    answers, reason = accepted_answers(row.get("answer"))
    if reason:
        raise InputError(f"{where}: {reason} (key answer)")
    if ("completion" in row) == ("completions" in row):
        raise InputError(f"{where}: give either completion (a string) or completions (a list)")
    several = "completions" in row
    texts = row["completions"] if several else [row["completion"]]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        expected = "a list of strings" if several else "a string"
        raise InputError(f"{where}: completion{'s are' if several else ' is'} not {expected}")
    reasons = row.get("finish_reason", ["stop"] * len(texts) if several else "stop")
    reasons = reasons if several else [reasons]
    if (
        not isinstance(reasons, list)
        or len(reasons) != len(texts)
        or any(reason not in ("stop", "length") for reason in reasons)
    ):
        raise InputError(f"{where}: finish_reason is not stop or length, one per completion")
    return [Item(answers, text, finish) for text, finish in zip(texts, reasons, strict=True)]
