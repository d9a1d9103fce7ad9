"""`entrograd explain`: one group, worked by hand."""

from __future__ import annotations

import argparse
import json

HELP = "what a method does to one group"


def arguments(parser: argparse.ArgumentParser) -> None:
    """This command's arguments."""
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


def run(given: argparse.Namespace) -> None:
    """Print the answer."""
    from entrograd.methods.explain.explain import explain

    answer = explain(given.method, given.group, given.set)
    print(json.dumps(answer, indent=2, allow_nan=False))  # in ASCII: heads may have any name
