"""What every stage shares: arguments, its sections of params.yaml, logs, seeds, resume state, the
run manifest beside each output, timings, and errors as one sentence.

A stage script names its inputs, outputs and sections and hands over one function.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import yaml

from entrograd.errors import InputError, Unfinished, out_of_memory
from entrograd.params import Section, execution, execution_keys
from entrograd.pipeline import fingerprint
from entrograd.pipeline.arguments import flag_of, input_of, parser_of, paths_of
from entrograd.pipeline.manifest import write_manifests
from entrograd.pipeline.modules import PACKAGE, SOURCE
from entrograd.pipeline.outputs import check_outputs, check_writable, claimed
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
    script = Path(str(sys.modules[work.__module__].__file__)).resolve()
    os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
    logging.basicConfig(level=logging.INFO, format=f"{name}: %(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    for noisy in ("httpx", "py.warnings", "latex2sympy2_extended.math_normalization"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    parser = parser_of(name, doc, tuple(params.model_fields), inputs, outputs, optional, options)
    arguments = parser.parse_args(argv)
    unfinished_work = Path(arguments.work)
    timings = Path(arguments.timings) if arguments.timings else None
    start = time.monotonic()
    try:
        _run_the_code_beside(script)
        given_params = read_params(arguments.params, params)
        given = {
            key: input_of(key, getattr(arguments, key), default, key in optional)
            for key, default in inputs.items()
        }
        written = {key: Path(getattr(arguments, key)) for key in outputs}
        named = [Path(file) for file in given_params.files()] if reads_named else []
        _warn_unlisted(name, named)
        read = [*(path for value in given.values() for path in paths_of(value)), *named]
        check_outputs(
            name,
            {flag_of(key): path for key, path in written.items()},
            {flag_of(key) for key, default in outputs.items() if not Path(default).suffix},
            [*read, Path(arguments.params)],
            unfinished_work,
        )
        for path in filter(None, (unfinished_work / name, timings)):
            check_writable(path)
        roles = {
            key: list(value) if isinstance(value, dict) else value is not None
            for key, value in given.items()
        }

        files = fingerprint.files_of(script, _components(given_params))

        def identity() -> fingerprint.Fingerprint:
            sections = read_params(arguments.params, params)
            hashes = {str(path): sha256(path) for path in read if path.exists()}
            code = fingerprint.hashes_of(file for file in files if file.exists())
            return fingerprint.fingerprint(name, sections.model_dump(), hashes, roles, code)

        started_with = identity()
        resume = _resume_folder(unfinished_work, arguments.resume, started_with)
        paths = SimpleNamespace(**given, **written)
        given_options = SimpleNamespace(**{key: getattr(arguments, key) for key in options})
        run = Run(given_params, paths, resume, given_options)
        if os.environ.get("RANK", "0") != "0":  # of several processes the first writes and speaks
            work(run)
            return 0
        with claimed(name, written.values()), fingerprint.kept_if_begun(resume):
            try:
                with _memory_suffices(name, params):
                    result = work(run)
            except Unfinished:
                _check_unchanged(started_with, identity, ())
                raise
            _check_unchanged(started_with, identity, written.values())
            write_manifests(written.values(), started_with, _execution(given_params), files)
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


def _components(params: Section) -> list[str]:
    """The modules of the components that the sections' method uses, if one of them is a method."""
    method = getattr(params, "method", None)
    return method.modules if method else []


def _execution(params: Section) -> dict[str, object]:
    """The settings of these sections that change no result, by section and dotted key: without
    addresses and folders, which are the machine's own."""
    sections = {name: execution(getattr(params, name)) for name in type(params).model_fields}
    return {name: _public(values) for name, values in sections.items() if values}


def _public(values: Mapping[str, object]) -> dict[str, object]:
    return {
        key: _public(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if not key.endswith(("url", "address", "folder"))
    }


def _run_the_code_beside(script: Path) -> None:
    """InputError where the package beside the stage's script is not the one at work: its outputs
    would be recorded as those of the other. Processes that the stage starts import this one too."""
    beside = script.parent.parent / "src"
    if (beside / PACKAGE.name).is_dir() and beside != SOURCE:
        raise InputError(
            f"{script}: {PACKAGE} is at work, not {beside / PACKAGE.name} beside this script; put "
            "that folder first on sys.path, as the scripts of the project do"
        )
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if str(SOURCE) not in others[:1]:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(SOURCE), *others])


@contextmanager
def _memory_suffices(stage: str, params: type[Section]) -> Iterator[None]:
    """InputError with its remedy where memory runs out in the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        remedy = "take a smaller model or a machine with more memory"
        if (stage, "token_budget") in execution_keys(params):
            remedy = (
                f"lower execution.{stage}.token_budget and run it again: it goes on where it was"
            )
        raise InputError(f"out of memory; {remedy} ({str(error)[:200]})") from error


def _check_unchanged(
    before: fingerprint.Fingerprint,
    identity: Callable[[], fingerprint.Fingerprint],
    outputs: Collection[Path],
) -> None:
    """InputError, and no output, where parameters, inputs or code were edited while the stage was
    at work: DVC reads them when a stage has ended, and would record them as what it ran with."""
    try:
        changed = fingerprint.differences(before, identity())
    except InputError as error:
        changed = [str(error)]
    if changed:
        for path in outputs:
            remove_folder(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise InputError(
            f"changed while this stage was at work: {'; '.join(changed)}; its outputs are removed "
            "and its unfinished work is kept: undo the change to go on there, or run it again as "
            "things are now"
        )


def _resume_folder(work: Path, asked: str | None, now: fingerprint.Fingerprint) -> Path:
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


def _write_timing(path: Path, name: str, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:  # two stages may end at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = read_json(path) if path.exists() else {}
        write_json(path, {**known, name: round(seconds, 2)})
