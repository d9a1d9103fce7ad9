"""The arguments of a stage: its inputs, outputs and options, and those that every stage has."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from entrograd.errors import InputError

log = logging.getLogger("entrograd")

TIMINGS = Path("results/timings.json")


def parser_of(
    name: str,
    doc: str | None,
    sections: Sequence[str],
    inputs: Mapping[str, str | Mapping[str, str]],
    outputs: Mapping[str, str],
    optional: Collection[str],
    options: Mapping[str, str],
) -> argparse.ArgumentParser:
    """The parser of a stage's command line; the arguments are those of `run_stage`."""
    parser = argparse.ArgumentParser(
        prog=f"python stages/{name}.py",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for key, default in (*inputs.items(), *outputs.items()):
        flag = flag_of(key)
        kind = "output" if key in outputs else "input"
        if isinstance(default, str):
            note = "; may be absent, '' for none" if key in optional and default else ""
            parser.add_argument(
                flag,
                default=default,
                metavar="PATH",
                help=f"{kind} (default: {default or 'none'}{note})",
            )
        else:
            known = ", ".join(f"{name}={path}" for name, path in default.items())
            parser.add_argument(
                flag,
                action="append",
                metavar="NAME=PATH",
                help=f"{kind}, as often as needed (default: {known})",
            )
    for key, text in options.items():
        parser.add_argument(f"--{key}", help=text)
    parser.add_argument(
        "--params",
        default="params.yaml",
        help=f"parameters (params.yaml); sections read: {', '.join(sections)}",
    )
    parser.add_argument(
        "--work", default=".entrograd/resume", help="unfinished work (.entrograd/resume)"
    )
    parser.add_argument(
        "--resume",
        metavar="FOLDER",
        help="unfinished work to continue; refused where parameters, inputs or code differ "
        "(default: that of the same run, if any)",
    )
    parser.add_argument(
        "--timings", default=str(TIMINGS), help="seconds per stage are added here ('' for nowhere)"
    )
    return parser


def input_of(
    key: str, value: str | list[str] | None, default: str | Mapping[str, str], optional: bool
) -> Path | dict[str, Path] | None:
    """The path or named paths an input argument stands for; InputError where one is absent."""
    flag = flag_of(key)
    if isinstance(value, str):
        path = Path(value)
        if optional and (not value or (value == default and not path.exists())):
            if default:
                log.info("no %s: going on without it (%s)", value or key, flag)
            return None
        if not value or not path.exists():
            raise InputError(f"{value or flag}: no such file or folder ({flag})")
        return path
    assert not isinstance(default, str)
    named = {name: Path(path) for name, path in default.items()} if value is None else {}
    for item in value or ():
        name, equals, path_text = item.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z0-9._-]+", name) or not path_text:
            raise InputError(f"{flag} {item}: expected NAME=PATH, the name of A-Z a-z 0-9 . _ -")
        if name in named:
            raise InputError(f"{flag} {item}: {name} is named twice; names must differ")
        named[name] = Path(path_text)
    for name, path in named.items():
        if not path.exists():
            raise InputError(f"{path}: no such file or folder ({flag} {name}={path})")
    return named


def paths_of(value: Path | dict[str, Path] | None) -> list[Path]:
    """The paths that an input argument stands for."""
    if isinstance(value, dict):
        return list(value.values())
    return [] if value is None else [value]


def flag_of(key: str) -> str:
    """An argument's name as it is typed."""
    return f"--{key.replace('_', '-')}"
