"""`entrograd methods`: the methods, their components and the columns those read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

HELP = "every method and component: paper, equation, required columns"


def arguments(parser: argparse.ArgumentParser) -> None:
    """This command's arguments."""
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(given: argparse.Namespace) -> None:
    """Print the answer."""
    from entrograd.methods.catalogue import components_table, methods_table

    methods, components = methods_table(), components_table()
    if given.json:
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
