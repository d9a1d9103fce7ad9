"""`entrograd`: small tools around the pipeline. Each prints to stdout; errors are one sentence
on stderr and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from entrograd.cli import (
    check,
    cluster,
    decontaminate,
    deps,
    explain,
    grade,
    methods,
    summary,
)
from entrograd.errors import InputError

# A command is a file here: its HELP, its arguments, and run, where the heavy imports are.
COMMANDS = {
    "check": check,
    "grade": grade,
    "cluster": cluster,
    "decontaminate": decontaminate,
    "explain": explain,
    "methods": methods,
    "deps": deps,
    "summary": summary,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(prog="entrograd", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.arguments(subparsers.add_parser(name, help=command.HELP, description=command.HELP))
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
