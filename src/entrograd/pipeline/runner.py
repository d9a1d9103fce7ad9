"""What every stage shares: arguments, its sections of params.yaml, logs, seeds, resume state, the
run manifest beside each output, timings, and errors as one sentence.

A stage script names its inputs, outputs and sections and hands over one function.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import yaml

from entrograd.errors import InputError, Unfinished
from entrograd.params import Section
from entrograd.pipeline import fingerprint
from entrograd.pipeline.outputs import check_outputs, check_writable, claimed, write_run_manifest
from entrograd.pipeline.parent import end_with_parent
from entrograd.pipeline.rules import read as read_params
from entrograd.storage.files import read_json, remove_folder, write_json
from entrograd.storage.hashing import sha256

log = logging.getLogger("entrograd")

QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
TIMINGS = Path("results/timings.json")


@dataclass(frozen=True)
class Run:
    """What a stage's function gets.

    params: the sections the stage reads.
    paths: every input and output by name: a Path, a dict name -> Path where the input is a set of
        named paths, None where an optional input is absent.
    resume: a folder for unfinished work, kept until the stage succeeds.
    options: the further arguments.
    """

    params: Any
    paths: SimpleNamespace
    resume: Path
    options: SimpleNamespace


def run_stage(
    name: str,
    work: Callable[[Run], str],
    *,
    doc: str | None,
    params: type[Section],
    inputs: Mapping[str, str | Mapping[str, str]],
    outputs: Mapping[str, str],
    optional: Collection[str] = (),
    options: Mapping[str, str] = MappingProxyType({}),
    reads_named: bool = True,
    argv: list[str] | None = None,
) -> int:
    """Parse arguments, check everything that can be checked, run `work`, say one line.

    Args:
        name: the stage, as in dvc.yaml.
        work: the library call; returns the one-line result.
        doc: the stage's help text.
        params: has a field for each section of params.yaml it reads; they key its resume state.
        inputs, outputs: argument name -> default path. An input whose default is a mapping
            name -> path is given as NAME=PATH, any number of times. An output whose default has
            no suffix is a folder.
        optional: inputs that may be absent: '' is none, and so is a default that does not exist.
        options: further arguments that change no result, name -> help; None where not given.
        reads_named: whether files that the sections name are inputs; False where the names alone
            are read.

    Returns the exit code: 0 (also where `work` raises Unfinished: what it did is kept), or 2 after
    a one-sentence error.
    """
    end_with_parent(signal.SIGTERM)
    os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
    logging.basicConfig(level=logging.INFO, format=f"{name}: %(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    for noisy in ("httpx", "py.warnings", "latex2sympy2_extended.math_normalization"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    sections = tuple(params.model_fields)
    parser = _parser(name, doc, sections, inputs, outputs, optional, options)
    arguments = parser.parse_args(argv)
    unfinished_work = Path(arguments.work)
    timings = Path(arguments.timings) if arguments.timings else None
    start = time.monotonic()
    try:
        given_params = read_params(arguments.params, params)
        given = {
            key: _input(key, getattr(arguments, key), default, key in optional)
            for key, default in inputs.items()
        }
        written = {key: Path(getattr(arguments, key)) for key in outputs}
        chosen = given_params.model_dump()
        named = [Path(file) for file in given_params.files()] if reads_named else []
        _warn_unlisted(name, named)
        read = [*(path for value in given.values() for path in _files(value)), *named]
        check_outputs(
            name,
            {_flag(key): path for key, path in written.items()},
            {_flag(key) for key, default in outputs.items() if not Path(default).suffix},
            [*read, Path(arguments.params)],
            unfinished_work,
        )
        for path in filter(None, (unfinished_work / name, timings)):
            check_writable(path)
        hashes = {str(path): sha256(path) for path in read if path.exists()}
        roles = {
            key: list(value) if isinstance(value, dict) else value is not None
            for key, value in given.items()
        }
        resume = _resume_folder(
            unfinished_work, arguments.resume, fingerprint.fingerprint(name, chosen, hashes, roles)
        )
        paths = SimpleNamespace(**given, **written)
        given_options = SimpleNamespace(**{key: getattr(arguments, key) for key in options})
        run = Run(given_params, paths, resume, given_options)
        if os.environ.get("RANK", "0") != "0":  # of several processes the first writes and speaks
            work(run)
            return 0
        with claimed(name, written.values()), fingerprint.kept_if_begun(resume):
            result = work(run)
            for path in written.values():
                write_run_manifest(name, path, chosen, hashes)
        seconds = time.monotonic() - start
        if timings:
            _write_timing(timings, name, seconds)
        remove_folder(resume)
    except Unfinished as unfinished:
        print(f"{name}: {unfinished} ({time.monotonic() - start:.1f} s)")
        return 0
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    print(f"{name}: {result} ({seconds:.1f} s)")
    return 0


def _resume_folder(work: Path, asked: str | None, now: dict[str, Any]) -> Path:
    """Where unfinished work of this very run is, or will be; InputError where the work asked for
    belongs to another."""
    for leftover in work.glob(".*.removed"):
        shutil.rmtree(leftover, ignore_errors=True)
    if asked is None:
        fingerprint.note_other_work(work, now)
        folder = work / f"{now['stage']}-{fingerprint.key(now)}"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / fingerprint.FILE, now)
        return folder
    before = read_json(Path(asked) / fingerprint.FILE)
    if changed := fingerprint.differences(before, now):
        raise InputError(
            f"--resume {asked}: cannot be continued, changed since: {'; '.join(changed)}; undo the "
            "change, or leave --resume out to start anew"
        )
    return Path(asked)


def _input(
    key: str, value: str | list[str] | None, default: str | Mapping[str, str], optional: bool
) -> Path | dict[str, Path] | None:
    """The path or named paths an input argument stands for; InputError where one is absent."""
    flag = _flag(key)
    if isinstance(value, str):
        path = Path(value)
        if optional and (not value or (value == default and not path.exists())):
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


def _warn_unlisted(stage: str, files: Sequence[Path]) -> None:
    """Under DVC, say which files named in params.yaml it will not see change."""
    if os.environ.get("DVC_STAGE") != stage or not Path("dvc.yaml").exists():
        return
    listed = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"][stage]
    known = {Path(item) for item in listed.get("deps", ()) if isinstance(item, str)}
    for file in files:
        if not known & {file, *file.parents}:
            log.warning("%s is not in dvc.yaml: add it to the deps of %s, or DVC will not notice "
                        "when it changes", file, stage)  # fmt: skip


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _files(value: Path | dict[str, Path] | None) -> list[Path]:
    if isinstance(value, dict):
        return list(value.values())
    return [] if value is None else [value]


def _parser(
    name: str,
    doc: str | None,
    sections: Sequence[str],
    inputs: Mapping[str, str | Mapping[str, str]],
    outputs: Mapping[str, str],
    optional: Collection[str],
    options: Mapping[str, str],
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python stages/{name}.py",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for key, default in (*inputs.items(), *outputs.items()):
        flag = _flag(key)
        kind = "output" if key in outputs else "input"
        if isinstance(default, str):
            note = "; may be absent, '' for none" if key in optional else ""
            parser.add_argument(
                flag, default=default, metavar="PATH", help=f"{kind} (default: {default}{note})"
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
        "--timings", default=str(TIMINGS), help="seconds a stage are added here ('' for nowhere)"
    )
    return parser


def _write_timing(path: Path, name: str, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:  # two stages may end at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = read_json(path) if path.exists() else {}
        write_json(path, {**known, name: round(seconds, 2)})
