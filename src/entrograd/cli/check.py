"""`entrograd check`: a params.yaml, before anything is run."""

from __future__ import annotations

import argparse

HELP = "whether a params.yaml is valid, every section of it"


def arguments(parser: argparse.ArgumentParser) -> None:
    """This command's arguments."""
    parser.add_argument("params", nargs="?", default="params.yaml", help="the file (%(default)s)")


def run(given: argparse.Namespace) -> None:
    """Print the answer."""
    from entrograd.methods.registry import recipe
    from entrograd.pipeline.rules import read
    from entrograd.pipeline.sections import Params
    from entrograd.rewards import heads
    from entrograd.train.required_columns import check_required_columns, with_heads

    params = read(given.params, Params)
    chosen, names = recipe(params.method), tuple(heads.load(params.annotate.heads))
    for section in ("train_offline", "train_online"):
        check_required_columns(chosen, section, getattr(params, section), names)
    with_heads(chosen, names, dict.fromkeys(names, 0.0))
    needs = ", ".join(sorted(chosen.required_columns)) or "nothing"
    print(f"{given.params}: valid; method {params.method.title} needs of each completion: {needs}")
