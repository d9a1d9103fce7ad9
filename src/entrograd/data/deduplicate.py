"""One row per problem; rows that contradict each other are turned away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np

from entrograd.data.normalise import normalise
from entrograd.data.sources import Reject, Row, place
from entrograd.storage.hashing import text_hash


def deduplicate(rows: Sequence[Row]) -> tuple[list[Row], list[Row], list[Reject]]:
    """The first row of each normalised problem; its duplicates; rows in conflict.

    Rows of one problem agree if all of them accept one of the answers (spaces aside). If they do
    not, nobody knows which is right, and all of them are rejected.
    """
    kept: list[Row] = []
    duplicates: list[Row] = []
    rejects: list[Reject] = []
    first = first_equal(normalise(row.problem) for row in rows)
    for _, members in groupby(np.argsort(first, kind="stable"), first.__getitem__):
        group = [rows[i] for i in members]
        if _agree(group):
            kept.append(group[0])
            duplicates += group[1:]
        else:
            rejects += [_conflict(row, group) for row in group]
    return kept, duplicates, rejects


def first_equal(texts: Iterable[str]) -> np.ndarray:
    """[N] of each text the index of the first that equals it, by 128 bits of their sha256."""
    digests = bytearray()
    for text in texts:
        digests += bytes.fromhex(text_hash(text)[:32])
    _, first, group = np.unique(
        np.frombuffer(digests, "S16"), return_index=True, return_inverse=True
    )
    return first[group]


def _agree(group: Sequence[Row]) -> bool:
    """Whether all rows of one problem accept one of the answers."""
    return bool(set.intersection(*(_answers(row.answers) for row in group)))


def _answers(answers: Iterable[str]) -> set[str]:
    return {"".join(answer.split()) for answer in answers}


def _conflict(row: Row, group: Sequence[Row]) -> Reject:
    mine = _answers(row.answers)
    other = next((r for r in group if not mine & _answers(r.answers)), None)
    other = other or next(r for r in group if r is not row)
    return Reject(
        row.source,
        row.row,
        "conflicting answers",
        f"{row.problem} -> {' | '.join(row.answers)}, "
        f"but {' | '.join(other.answers)} in {place(other)}",
        row.line,
    )
