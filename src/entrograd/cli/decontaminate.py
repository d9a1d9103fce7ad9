"""`entrograd decontaminate`: which training problems overlap benchmarks."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from entrograd.errors import InputError

if TYPE_CHECKING:
    from entrograd.data.decontaminate import Report

HELP = "training problems that overlap benchmarks"


def arguments(parser: argparse.ArgumentParser) -> None:
    """This command's arguments."""
    from entrograd.data.params import Decontaminate

    default = Decontaminate()
    parser.add_argument("train", metavar="TRAIN", help="training file (JSONL, CSV or Parquet)")
    parser.add_argument("benchmarks", metavar="BENCH", nargs="+", help="benchmark files")
    parser.add_argument(
        "--ngram",
        type=int,
        default=default.ngram,
        metavar="N",
        help="words of a sequence (%(default)s)",
    )
    parser.add_argument(
        "--fraction",
        type=float,
        default=default.fraction,
        metavar="F",
        help="fraction of a training problem's sequences that must occur in one benchmark problem, "
        "or of that one's in it (%(default)s)",
    )
    parser.add_argument("--column", default="problem", help="the problems' column (%(default)s)")
    parser.add_argument("--json", action="store_true", help="the whole report as JSON")


def run(given: argparse.Namespace) -> None:
    """Print the answer."""
    from entrograd.data import decontaminate
    from entrograd.data.prepare import benchmark_names
    from entrograd.data.sources import read_problems

    if given.ngram < 1:
        raise InputError(f"--ngram {given.ngram}: give a number of words, at least 1")
    if not 0 <= given.fraction <= 1:
        raise InputError(f"--fraction {given.fraction}: give a fraction from 0 to 1")
    bounds = given.ngram, given.fraction
    train = read_problems(given.train, given.column)
    benchmarks = {
        name: read_problems(path, given.column) for name, path in benchmark_names(given.benchmarks)
    }
    found = decontaminate.find_overlaps(train, benchmarks, *bounds)
    report = decontaminate.report(train, benchmarks, found, *bounds)
    print(json.dumps(report, indent=2, ensure_ascii=False) if given.json else _as_text(report))


def _as_text(report: Report) -> str:
    from entrograd.data.decontaminate import KINDS

    lines = [f"{report['overlapping_rows']} of {report['train_rows']} training rows overlap"]
    for name, counts in report["by_benchmark"].items():
        found = ", ".join(f"{counts[kind]} {words}" for kind, words in KINDS.items())
        lines.append(f"  {name}: {counts['rows']} ({found}) of {counts['benchmark_rows']} problems")
    for example in report["examples"]:
        kind = KINDS[example["kind"]]
        lines.append(f"{example['benchmark']}, {kind}, fraction {example['fraction']:.2f}:")
        lines.append(f"  training row {example['train_row']}: {example['train_problem']!r}")
        lines.append(f"  its row {example['benchmark_row']}: {example['benchmark_problem']!r}")
    return "\n".join(lines)
