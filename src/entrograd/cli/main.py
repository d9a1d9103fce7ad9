"""`entrograd`: small tools around the pipeline. Each prints to stdout; errors are one sentence
on stderr and exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from entrograd.errors import InputError


@dataclass(frozen=True)
class Command:
    """A subcommand: its help, its arguments and what it does. Heavy imports belong into `run`."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


# --- decontaminate ----------------------------------------------------------------------------


def _decontaminate_arguments(parser: argparse.ArgumentParser) -> None:
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
        help="share of a training problem's sequences that must stand in one benchmark problem, or "
        "of that one's in it (%(default)s)",
    )
    parser.add_argument("--column", default="problem", help="the problems' column (%(default)s)")
    parser.add_argument("--json", action="store_true", help="the whole report as JSON")


def _decontaminate(arguments: argparse.Namespace) -> None:
    from entrograd.data import decontaminate
    from entrograd.data.prepare import benchmark_names
    from entrograd.data.sources import read_problems

    if arguments.ngram < 1:
        raise InputError(f"--ngram {arguments.ngram}: give a number of words, at least 1")
    if not 0 <= arguments.fraction <= 1:
        raise InputError(f"--fraction {arguments.fraction}: give a share from 0 to 1")
    bounds = arguments.ngram, arguments.fraction
    train = read_problems(arguments.train, arguments.column)
    benchmarks = {
        name: read_problems(path, arguments.column)
        for name, path in benchmark_names(arguments.benchmarks)
    }
    found = decontaminate.find_overlaps(train, benchmarks, *bounds)
    report = decontaminate.report(train, benchmarks, found, *bounds)
    print(json.dumps(report, indent=2, ensure_ascii=False) if arguments.json else _as_text(report))


def _as_text(report: dict[str, Any]) -> str:
    from entrograd.data.decontaminate import KINDS

    lines = [f"{report['overlapping_rows']} of {report['train_rows']} training rows overlap"]
    for name, counts in report["by_benchmark"].items():
        found = ", ".join(f"{counts[kind]} {words}" for kind, words in KINDS.items())
        lines.append(f"  {name}: {counts['rows']} ({found}) of {counts['benchmark_rows']} problems")
    for example in report["examples"]:
        kind = KINDS[example["kind"]]
        lines.append(f"{example['benchmark']}, {kind}, share {example['share']:.2f}:")
        lines.append(f"  training row {example['train_row']}: {example['train_problem']!r}")
        lines.append(f"  its row {example['benchmark_row']}: {example['benchmark_problem']!r}")
    return "\n".join(lines)


# --- grade -----------------------------------------------------------------------------------


def _grade_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        metavar="FILE.jsonl",
        help="rows of answer (text, or a list) and completion, or completions",
    )
    parser.add_argument(
        "--params",
        metavar="PARAMS.yaml",
        help="grade as annotate.grader of this file says (default: the grader's own defaults)",
    )


def _grade(arguments: argparse.Namespace) -> None:
    from entrograd.annotate.params import AnnotateStage
    from entrograd.pipeline.rules import read
    from entrograd.rewards.params import GraderParams
    from entrograd.rewards.verify.grade import Grader
    from entrograd.rewards.verify.rows import grade_file

    chosen = GraderParams()
    if arguments.params:
        chosen = read(arguments.params, AnnotateStage).annotate.grader
    with Grader(chosen) as grader:
        for row in grade_file(arguments.file, grader):
            print(json.dumps(row))  # in ASCII: what a model wrote cannot reach the terminal


# --- cluster ---------------------------------------------------------------------------------


def _cluster_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE.jsonl", help="problem, completions, optional logprobs; a row a line"
    )
    parser.add_argument(
        "--by", choices=["answer", "embedding", "entailment"], help="what is compared (answer)"
    )
    parser.add_argument("--match", choices=["exact", "mathematical"], help="of answers (exact)")
    parser.add_argument("--model", metavar="REFERENCE", help="of embedding and entailment")
    parser.add_argument("--threshold", type=float, metavar="COSINE", help="of embedding (0.85)")
    parser.add_argument(
        "--text", choices=["completion", "answer"], help="of embedding and entailment (completion)"
    )
    parser.add_argument("--device", default="auto", help="of the model (%(default)s)")
    parser.add_argument(
        "--params",
        metavar="PARAMS.yaml",
        help="cluster as section annotate of this file says, instead of the options above",
    )


def _cluster(arguments: argparse.Namespace) -> None:
    from entrograd.annotate.clusters import clusterer
    from entrograd.annotate.params import AnnotateParams, AnnotateStage
    from entrograd.annotate.rows import cluster_file
    from entrograd.params import check
    from entrograd.pipeline.rules import read
    from entrograd.pipeline.runner import QUIET
    from entrograd.rewards.verify.grade import Grader

    options = {
        key: getattr(arguments, key)
        for key in ("match", "model", "threshold", "text")
        if getattr(arguments, key) is not None
    }
    if arguments.params:
        if options or arguments.by:
            raise InputError("--params says how to cluster; leave the other options out")
        chosen = read(arguments.params, AnnotateStage).annotate
    else:
        kind = arguments.by or "answer"
        if kind != "answer" and arguments.model is None:
            raise InputError(f"--by {kind} needs --model REFERENCE")
        clusters = {"kind": kind, **options}
        try:
            chosen = check(AnnotateParams, {"clusters": clusters}, "")
        except InputError as error:
            raise InputError(str(error).replace("params.yaml: ", "")) from None
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    with Grader(chosen.grader) as grader:
        cluster = clusterer(chosen.clusters, grader, arguments.device)
        for row in cluster_file(arguments.file, cluster, chosen.grader.extraction):
            print(json.dumps(row))


# --- explain, methods ------------------------------------------------------------------------


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", required=True, metavar="NAME", help="see: entrograd methods")
    parser.add_argument(
        "--group", required=True, metavar="FILE.json", help="rewards, entropies, ... of one group"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter (a2=0.2, seed_grpo.alpha=0.1) or a component (advantage=gtpo)",
    )


def _explain(arguments: argparse.Namespace) -> None:
    from entrograd.methods.explain.explain import explain

    answer = explain(arguments.method, arguments.group, arguments.set)
    print(json.dumps(answer, indent=2, allow_nan=False))  # in ASCII: heads may have any name


def _methods_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def _methods(arguments: argparse.Namespace) -> None:
    from entrograd.methods.catalogue import components_table, methods_table

    methods, components = methods_table(), components_table()
    if arguments.json:
        rows = {
            "methods": [row._asdict() for row in methods],
            "components": [row._asdict() for row in components],
        }
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    lines = [["method", *methods[0].components, "required columns"]]
    lines += [
        [row.name, *row.components.values(), _columns(row.required_columns)] for row in methods
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
    for part in components:
        print(f"\n{part.choice}: {part.name}  ({part.paper})")
        print(f"    {part.equation}")
        print(f"    required columns: {_columns(part.required_columns)}")
        for setting, columns in part.required_columns_with.items():
            print(f"      with {setting}: {_columns(columns)}")
    print("\nEvery reward has overlong_length and overlong_buffer. Every loss has kl_coefficient,")
    print("which reads ref_logprobs, and importance_sampling, which reads sampling_logprobs.")


def _columns(names: Sequence[str]) -> str:
    return ", ".join(names) or "rewards alone"


# --- check -----------------------------------------------------------------------------------


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("params", nargs="?", default="params.yaml", help="the file (%(default)s)")


def _check(arguments: argparse.Namespace) -> None:
    from entrograd.methods.registry import recipe
    from entrograd.pipeline.rules import read
    from entrograd.pipeline.sections import Params
    from entrograd.rewards import heads
    from entrograd.train.required_columns import check_required_columns, with_heads

    params = read(arguments.params, Params)
    chosen, names = recipe(params.method), tuple(heads.load(params.annotate.heads))
    for section in ("train_offline", "train_online"):
        check_required_columns(chosen, section, getattr(params, section), names)
    with_heads(chosen, names, dict.fromkeys(names, 0.0))
    needs = ", ".join(sorted(chosen.required_columns)) or "nothing"
    print(
        f"{arguments.params}: valid; method {params.method.title} needs of each completion: {needs}"
    )


COMMANDS = {
    "check": Command(
        "whether a params.yaml is valid, every section of it", _check_arguments, _check
    ),
    "grade": Command(
        "the rows of a JSONL file with reward, extracted answer and status",
        _grade_arguments,
        _grade,
    ),
    "cluster": Command(
        "the rows of a JSONL file with clusters and semantic entropy",
        _cluster_arguments,
        _cluster,
    ),
    "decontaminate": Command(
        "training problems that overlap benchmarks", _decontaminate_arguments, _decontaminate
    ),
    "explain": Command("what a method does to one group", _explain_arguments, _explain),
    "methods": Command(
        "every method and component: paper, equation, required columns",
        _methods_arguments,
        _methods,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(prog="entrograd", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(subparsers.add_parser(name, help=command.help, description=command.help))
    arguments = parser.parse_args(argv)
    try:
        COMMANDS[arguments.command].run(arguments)
    except InputError as error:
        print(f"entrograd {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
