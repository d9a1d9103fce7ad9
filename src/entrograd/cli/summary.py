"""`entrograd summary`: what to know after a run: accuracies with their intervals, seconds per
stage, where the report is."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from entrograd.errors import InputError

if TYPE_CHECKING:
    from entrograd.report.scores import Score

HELP = "accuracies, seconds per stage and where the report is, after a run"


def arguments(parser: argparse.ArgumentParser) -> None:
    """This command's arguments."""
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--report", type=Path, default=Path("report/index.html"))
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))


def run(given: argparse.Namespace) -> None:
    """Print the answer."""
    print(summary(given.results, given.report, given.params))


def summary(results: Path, report: Path, params_file: Path) -> str:
    """The text; InputError where no summary.json is in `results`."""
    from entrograd.evaluate.params import ScoreStage
    from entrograd.pipeline.rules import read
    from entrograd.report.scores import scores
    from entrograd.storage.files import read_json

    path = results / "summary.json"
    if not path.exists():
        raise InputError(f"{path}: no such file; stage score writes it: make run")
    models, differences = scores(read_json(path), str(path))
    timings = results / "timings.json"
    interval = "interval"
    if params_file.exists():
        interval = f"{100 * read(params_file, ScoreStage).score.confidence:g} % interval"
    lines = [
        *_accuracies(models, differences, interval),
        *_seconds(read_json(timings) if timings.exists() else {}),
        f"report: {report}" if report.exists() else f"report: {report} is not there yet",
    ]
    return "\n".join(lines)


def _accuracies(models: Sequence[Score], differences: Sequence[Score], interval: str) -> list[str]:
    if not models:
        return ["no held-out accuracy in this run; benchmarks are in results/benchmarks.json", ""]
    n = models[0].n
    head = "greedy accuracy" + (f", {n} held-out problems" if n else "")
    rows = [(head, "", interval)]
    rows += [(m.name, m.percent, m.percent_range) for m in models]
    rows += [(d.words, d.points, d.points_range + " *" * d.no_width) for d in differences]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    note = ["* without width an interval says nothing: all differences are equal"]
    lines = [f"{a:<{first}}  {b:>{second}}  {c}" for a, b, c in rows]
    return lines + note * any(d.no_width for d in differences) + [""]


def _seconds(timings: Mapping[str, float]) -> list[str]:
    """Seconds of each stage when it last ran, longest first, and their sum."""
    if not timings:
        return []
    ordered = sorted(timings.items(), key=lambda item: (-item[1], item[0]))
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in ordered)
    return [f"seconds when last run: {sum(timings.values()):.0f} in all ({stages})"]
