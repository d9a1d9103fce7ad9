"""`entrograd methods`: the methods and what they need."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

HELP = "every method: paper, equation, needs"


def arguments(parser: argparse.ArgumentParser) -> None:
    """This command's arguments."""
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(given: argparse.Namespace) -> None:
    """Print the answer."""
    from entrograd.methods.catalogue import methods_table

    table = methods_table()
    if given.json:
        print(json.dumps(table, indent=2, ensure_ascii=False))
        return
    for method in table:
        print(f"{method['name']}  ({method['paper']})")
        print(f"    {method['equation']}")
        print(f"    needs: {_columns(method['needs'])}")
        for setting, needs in method["needs_with"].items():
            print(f"      with {setting}: {_columns(needs)}")
    print("The options of any loss: kl_coefficient above 0 needs ref_logprobs too,")
    print("importance_sampling sampling_logprobs.")


def _columns(needs: Sequence[str]) -> str:
    return ", ".join(needs) or "rewards alone"
