"""`entrograd grade`: the grader on a file."""

from __future__ import annotations

import argparse
import json

HELP = "the rows of a JSONL file with reward, extracted answer and status"


def arguments(parser: argparse.ArgumentParser) -> None:
    """This command's arguments."""
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


def run(given: argparse.Namespace) -> None:
    """Print the answer."""
    from entrograd.annotate.params import AnnotateStage
    from entrograd.pipeline.rules import read
    from entrograd.rewards.params import GraderParams
    from entrograd.rewards.verify.grade import Grader
    from entrograd.rewards.verify.rows import grade_file

    chosen = GraderParams()
    if given.params:
        chosen = read(given.params, AnnotateStage).annotate.grader
    with Grader(chosen) as grader:
        for row in grade_file(given.file, grader):
            print(json.dumps(row))  # in ASCII: what a model wrote cannot reach the terminal
