"""`entrograd cluster`: clusters and semantic entropy of the groups of a file."""

from __future__ import annotations

import argparse
import json
import os

from entrograd.errors import InputError

HELP = "the rows of a JSONL file with clusters and semantic entropy"


def arguments(parser: argparse.ArgumentParser) -> None:
    """This command's arguments."""
    parser.add_argument(
        "file", metavar="FILE.jsonl", help="problem, completions, optional logprobs; a row per line"
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


def run(given: argparse.Namespace) -> None:
    """Print the answer."""
    from entrograd.annotate.clusters import clusterer
    from entrograd.annotate.params import AnnotateParams, AnnotateStage
    from entrograd.annotate.rows import cluster_file
    from entrograd.params import check
    from entrograd.pipeline.rules import read
    from entrograd.pipeline.runner import QUIET
    from entrograd.rewards.verify.grade import Grader

    options = {
        key: getattr(given, key)
        for key in ("match", "model", "threshold", "text")
        if getattr(given, key) is not None
    }
    if given.params:
        if options or given.by:
            raise InputError("--params says how to cluster; leave the other options out")
        chosen = read(given.params, AnnotateStage).annotate
    else:
        kind = given.by or "answer"
        if kind != "answer" and given.model is None:
            raise InputError(f"--by {kind} needs --model REFERENCE")
        clusters = {"kind": kind, **options}
        try:
            chosen = check(AnnotateParams, {"clusters": clusters}, "")
        except InputError as error:
            raise InputError(str(error).replace("params.yaml: ", "")) from None
    os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
    with Grader(chosen.grader) as grader:
        cluster = clusterer(chosen.clusters, grader, given.device)
        for row in cluster_file(given.file, cluster, chosen.grader.extraction):
            print(json.dumps(row))
