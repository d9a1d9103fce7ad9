"""What the page says in numbers besides scores: curves, fractions and counts from the pipeline's
files."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrograd.errors import InputError

# Files of numbers have their keys sorted; these are shown in this order, others after them.
COLUMNS = (
    "benchmark_rows",
    "rows",
    "exact",
    "ngram",
    "rejected",
    "duplicates",
    "few_shot_examples",
    "overlapping",
    "train",
    "heldout",
)
STATUSES = ("ok", "no_answer", "truncated", "timeout", "error")


# --- curves ----------------------------------------------------------------------------------


Curve = dict[str, list[float]]  # column -> its values, one per step


def read_curve(path: Path) -> Curve:
    """The numeric columns of a training log, NaN where a cell is empty.

    InputError where the file has neither `update` nor `round`, or a cell is not a number, naming
    row and column.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        names = list(reader.fieldnames or [])
    if rows and not axis(names):
        raise InputError(f"{path}: no column update or round; a training log has one of them")
    columns: Curve = {name: [] for name in names}
    for number, row in enumerate(rows, start=2):
        for name in names:
            try:
                columns[name].append(float(row[name]) if row[name] else math.nan)
            except (TypeError, ValueError):
                raise InputError(
                    f"{path}: line {number}: {name} is {row[name]!r}, not a number"
                ) from None
    return columns


def axis(names: Collection[str], of: str = "round") -> str | None:
    """The column that counts a training log's lines by `of` (round or update), or if there is
    none by the other."""
    return next((name for name in (of, "round", "update") if name in names), None)


def rolling_mean(values: Sequence[float], half: int) -> list[float]:
    """The mean of each value and up to `half` neighbours on either side; NaNs are left out."""
    means = []
    for i in range(len(values)):
        near = [v for v in values[max(0, i - half) : i + half + 1] if math.isfinite(v)]
        means.append(math.fsum(near) / len(near) if near else math.nan)
    return means


# --- groups ----------------------------------------------------------------------------------


def histogram(values: Iterable[float], low: float, high: float, bins: int) -> list[int]:
    """Counts of values in equal bins of [low, high]; the last bin holds `high` too, and what lies
    outside counts in the bin nearest to it."""
    counts = [0] * bins
    for value in values:
        place = int((value - low) / (high - low) * bins)
        counts[min(max(place, 0), bins - 1)] += 1
    return counts


@dataclass(frozen=True)
class Bin:
    """Groups whose semantic entropy lies in [low, high)."""

    low: float
    high: float
    groups: int
    mean_reward: float


def reward_by_entropy(
    entropies: Sequence[float], rewards: Sequence[float], high: float, bins: int
) -> list[Bin]:
    """Mean reward of the groups in each of `bins` equal bins of [0, high]; empty bins left out."""
    members: list[list[float]] = [[] for _ in range(bins)]
    for entropy, reward in zip(entropies, rewards, strict=True):
        members[min(max(int(entropy / high * bins), 0), bins - 1)].append(reward)
    width = high / bins
    return [
        Bin(i * width, (i + 1) * width, len(found), math.fsum(found) / len(found))
        for i, found in enumerate(members)
        if found
    ]


# --- facts -----------------------------------------------------------------------------------


def grouped(number: int) -> str:
    """A whole number, its thousands set apart."""
    return f"{number:,}".replace(",", "\u202f")


def facts(value: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """The numbers and short texts of a metrics file, nested names joined, in the file's order."""
    found: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(item, Mapping):
            found += facts(item, f"{name} · ")
        elif isinstance(item, bool) or (isinstance(item, str) and len(item) <= 40):
            found.append((name, str(item)))
        elif isinstance(item, int):
            found.append((name, grouped(item)))
        elif isinstance(item, float):
            found.append((name, f"{item:.4g}"))
    return found


def words(value: Mapping[str, object], names: Mapping[str, str]) -> str:
    """The whole numbers of `value` that `names` has words for, as a phrase."""
    return ", ".join(
        f"{grouped(number)} {name}"
        for key, name in names.items()
        if isinstance(number := value.get(key), int)
    )


@dataclass(frozen=True)
class Counts:
    """A small table of counts: column names and (name, cells) rows."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]


def counts(value: Mapping[str, object]) -> Counts | None:
    """Mappings of equal keys as a table, one row per mapping; None where there are none."""
    rows = {name: item for name, item in value.items() if isinstance(item, Mapping)}
    found = {key for item in rows.values() for key in item}
    columns = [key for key in COLUMNS if key in found] + sorted(found - set(COLUMNS))
    if not columns:
        return None
    shown = {name: dict(facts(item)) for name, item in rows.items()}
    words = [column.replace("_", " ") for column in columns]
    return Counts(
        words, [(name, [cells.get(w, "") for w in words]) for name, cells in shown.items()]
    )


def status_fractions(annotate: Mapping[str, Any]) -> dict[str, float]:
    """The fraction of completions with each reward status that occurs, in the statuses' order."""
    found = annotate.get("status") or {}
    return {name: float(found[name]) for name in STATUSES if found.get(name)}
