"""Accuracies of models and their differences, as stage score writes them, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from entrograd.errors import InputError
from entrograd.report.settings import pairs

MINUS = "_minus_"


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


def scores(
    summary: Mapping[str, Mapping[str, float]], where: str
) -> tuple[list[Score], list[Score]]:
    """Models, in the order training made them, and differences of a summary file.

    The file's keys are sorted; the reference of the differences comes first, then `offline`
    before `online`, others by name. InputError if an entry lacks a number.
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
            models.append(replace(score, n=None if n is None else int(n)))
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
    """One block per benchmark, by name; InputError if an entry is not as score writes it."""
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
