"""What the page says in numbers: scores, curves, shares and counts from the pipeline's files."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrograd.errors import InputError
from entrograd.report.settings import pairs

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
MINUS = "_minus_"


# --- scores ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """One model's accuracy (or one difference of two) with its interval, as fractions of 1."""

    name: str
    value: float
    low: float
    high: float
    n: int | None = None

    @property
    def percent(self) -> str:
        """The value in percent, one digit after the point."""
        return f"{100 * self.value:.1f} %"

    @property
    def percent_range(self) -> str:
        """The interval in percent."""
        return f"{100 * self.low:.1f} – {100 * self.high:.1f} %"

    @property
    def points(self) -> str:
        """The value as a difference in percentage points, signed."""
        return f"{signed(100 * self.value)} points"

    @property
    def points_range(self) -> str:
        """The interval of a difference, signed."""
        return f"{signed(100 * self.low)} to {signed(100 * self.high)}"

    @property
    def verdict(self) -> str:
        """What the interval of a difference says about its sign."""
        if self.no_width:
            return "no verdict"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no clear difference"

    @property
    def no_width(self) -> bool:
        """Whether the interval is a point: what was resampled is all equal; it says nothing."""
        return self.high - self.low < 1e-9

    @property
    def words(self) -> str:
        """`online_minus_base` as `online − base`."""
        return self.name.replace(MINUS, " − ")


def signed(value: float) -> str:
    """One digit after the point, with a sign, the minus a real one; zero has none."""
    text = f"{abs(value):.1f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "−") + text


def grouped(number: int) -> str:
    """A whole number, its thousands set apart."""
    return f"{number:,}".replace(",", "\u202f")


def scores(summary: Mapping[str, Any], where: str) -> tuple[list[Score], list[Score]]:
    """Models, in the order training made them, and differences of a summary file.

    The file's keys are sorted; the reference of the differences comes first, then `offline`
    before `online`, others by name. InputError where an entry lacks a number.
    """
    models, differences = [], []
    references = {name.partition(MINUS)[2] for name in summary if MINUS in name}
    for name, entry in summary.items():
        try:
            value = float(entry["accuracy" if "accuracy" in entry else "diff"])
            score = Score(name, value, float(entry["ci_low"]), float(entry["ci_high"]))
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{where}: {name}: expected accuracy or diff, ci_low and ci_high; stage score "
                "writes them"
            ) from None
        if "accuracy" in entry:
            n = entry.get("n")
            models.append(Score(name, score.value, score.low, score.high, n and int(n)))
        else:
            differences.append(score)
    rank = {"offline": 1, "online": 2}
    models.sort(key=lambda m: (m.name not in references, rank.get(m.name, 0), m.name))
    differences.sort(key=lambda d: (rank.get(d.name.partition(MINUS)[0], 0), d.name))
    return models, differences


@dataclass(frozen=True)
class BenchmarkScores:
    """A benchmark as a block of the page."""

    name: str
    problems: int
    how: str
    list_sha256: str
    grader: str
    models: list[Score]
    differences: list[Score]
    setting: list[tuple[str, str]]  # all it takes to get the scores again


def benchmark_scores(benchmarks: Mapping[str, Any], where: str) -> list[BenchmarkScores]:
    """One block per benchmark, by name; InputError where an entry is not as score writes it."""
    blocks = []
    for name, entry in benchmarks.items():
        try:
            both = {**entry["models"], **entry["differences"]}
            n, temperature = int(entry["n"]), float(entry["temperature"])
            how = "greedy" if temperature == 0 else f"avg@{n} at temperature {temperature:g}"
            models, differences = scores(both, f"{where}: {name}")
            block = BenchmarkScores(
                name=name,
                problems=int(entry["problems"]),
                how=how,
                list_sha256=str(entry["list_sha256"]),
                grader=str(entry["grader"]),
                models=models,
                differences=differences,
                setting=_setting(entry),
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"{where}: {name}: {error} is missing or malformed") from None
        blocks.append(block)
    return blocks


def _setting(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All of a benchmark's entry but its scores, keys and values."""
    scores = {"accuracy", "ci_low", "ci_high", "reward_status"}
    models = {
        f"models.{name}": {key: value for key, value in model.items() if key not in scores}
        for name, model in entry["models"].items()
    }
    return [
        *pairs("", {k: v for k, v in entry.items() if k not in ("models", "differences")}),
        *pairs("", models),
    ]


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


def words(value: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The whole numbers of `value` that `names` has words for, as a phrase."""
    found = {key: value[key] for key in names if isinstance(value.get(key), int)}
    return ", ".join(f"{grouped(number)} {names[key]}" for key, number in found.items())


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
    """The share of each reward status that occurs, in the statuses' order."""
    found = annotate.get("status") or {}
    return {name: float(found[name]) for name in STATUSES if found.get(name)}
