"""Checkpoints: all a training run needs to go on and give the bits it would have given anyway.

A checkpoint is a folder `update-00000012`, named after the updates done:

- weights, exp_avg, exp_avg_sq, ... `.safetensors`: float32 master weights and AdamW's state;
- state.json: the scheduler's position, every random state, the learning curve so far, and what the
  training loop gives (position in the data, policy version);
- manifest.json, written last: size and sha256 of each file, and the run it belongs to.

A folder without a manifest, or whose files differ from it, is never continued.
"""

from __future__ import annotations

import base64
import json
import logging
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from entrograd.errors import InputError
from entrograd.models.load import system_errors
from entrograd.pipeline.fingerprint import FILE as ORIGIN
from entrograd.pipeline.fingerprint import Fingerprint, differences
from entrograd.storage.files import atomic_folder, read_json, remove_folder, write_json
from entrograd.storage.hashing import sha256
from entrograd.train.optimizer import Optimizer
from entrograd.train.params import Checkpoint as CheckpointParams
from entrograd.train.processes import ALONE, Processes
from entrograd.train.sharding import collected

log = logging.getLogger("entrograd")

MANIFEST = "manifest.json"
# Bytes a second that a disk takes at least: what the first checkpoint is expected to cost.
SLOW_DISK = 3e8


class CheckpointError(InputError):
    """A checkpoint that cannot be read or belongs to another run."""


class FileRecord(TypedDict):
    """A file of a checkpoint."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """A checkpoint's files by name, and the run it belongs to."""

    files: dict[str, FileRecord]
    origin: Fingerprint


class RandomState(TypedDict):
    """The state of every global random generator, as JSON."""

    python: tuple[int, Sequence[int], float | None]
    numpy: tuple[str, Sequence[int], int, int, float]
    torch: str  # base64
    cuda: list[str]  # of each device


@dataclass
class State:
    """What a loop keeps beside weights and optimiser. `data` is JSON of its own."""

    curve: list[dict[str, float]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run in `folder`, which outlives the process and not the success."""

    def __init__(
        self,
        resume: Path,
        params: CheckpointParams,
        optimizer: Optimizer,
        processes: Processes = ALONE,  # one writes, all read
    ) -> None:
        self.folder, self.params, self.optimizer = resume / "checkpoints", params, optimizer
        self.processes = processes
        file = resume / ORIGIN
        self.origin = read_json(file) if file.exists() else None
        self._spent, self._start = 0.0, time.monotonic()
        sizes = [master.numel() * master.element_size() for master in optimizer.masters.values()]
        self._cost = 3 * sum(sizes) / SLOW_DISK

    def restore(self) -> State:
        """Continue at the newest whole checkpoint, or at the beginning where there is none.

        A damaged one is reported and the one before it taken. CheckpointError where a checkpoint
        belongs to another run.
        """
        killed = self.folder.glob(".update-*") if self.processes.main else ()
        for leftover in killed:  # written or removed by a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        for path in reversed(self.saved()):
            try:
                state = self.load(path)
            except DamagedError as error:
                log.warning("%s; the one before it is taken", error)
                continue
            log.info("continuing after update %d (%s)", self.optimizer.done, path)
            return state
        return State()

    def save_if_due(self, state: State) -> None:
        """Write a checkpoint where one is due after the update just done; drop those not kept.

        Due is every `every_updates`-th update, put off while writing would take more than
        `max_fraction` of the run's time. Where the best is kept nothing is put off: which one that
        is must not depend on a clock.
        """
        if self.optimizer.done % self.params.every_updates:
            return
        now = time.monotonic()
        budget = self.params.max_fraction * (now - self._start)
        may_wait = self.params.keep_best is None and self.params.max_fraction < 1
        if not self.processes.agree(not may_wait or self._spent + self._cost <= budget):
            return
        self.save(state)
        self._cost = time.monotonic() - now
        self._spent += self._cost
        if self.processes.main:
            self.prune(state.curve)

    def save(self, state: State) -> Path:
        """Write a checkpoint now; every process calls this. InputError where it cannot be written;
        older ones stay."""
        path = self.folder / f"update-{self.optimizer.done:08d}"
        parts, scalars = self.optimizer.state()
        tensors = {kind: collected(named, self.processes.main) for kind, named in parts.items()}
        if not self.processes.main:
            return path
        content = {
            "optimizer": scalars,
            "random": random_state(),
            "curve": state.curve,
            "data": state.data,
        }
        try:
            with atomic_folder(path) as folder, system_errors():
                for name, named in tensors.items():
                    save_file(named, folder / f"{name}.safetensors")
                (folder / "state.json").write_text(json.dumps(content), encoding="utf-8")
                files = {
                    file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
                    for file in sorted(folder.iterdir())
                }
                write_json(folder / MANIFEST, {"origin": self.origin, "files": files})
        except InputError as error:
            raise InputError(f"{error}; {self._last_words()}") from None
        return path

    def load(self, path: Path) -> State:
        """Put a checkpoint into weights, optimiser and random states.

        DamagedError names the file that is absent, cut off or changed; CheckpointError says what
        is different where the checkpoint is another run's. Either leaves everything as it was.
        """
        manifest = self._checked(path)
        if manifest["origin"] != self.origin and manifest["origin"] and self.origin:
            raise CheckpointError(
                f"{path}: a checkpoint of another run; changed since: "
                f"{'; '.join(differences(manifest['origin'], self.origin)) or 'paths'}; undo the "
                "change, or remove the checkpoint to start anew"
            )
        content = read_json(path / "state.json")
        files = [name for name in manifest["files"] if name.endswith(".safetensors")]
        tensors = {Path(name).stem: load_file(path / name) for name in files}
        self.optimizer.load_state(tensors, content["optimizer"])
        set_random_state(content["random"])
        return State(content["curve"], content["data"])

    def saved(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        return sorted(self.folder.glob("update-*"))

    def best(self, curve: list[dict[str, float]]) -> Path | None:
        """The checkpoint with the highest `keep_best` (lowest where that starts with '-').

        A row of the curve measures the policy before its update, so a checkpoint is judged by the
        row that follows it; the newest has none yet, and a row without a value judges none. Of
        equal ones the first wins. InputError where no row has a value.
        """
        if self.params.keep_best is None:
            return None
        name = self.params.keep_best.removeprefix("-")
        sign = 1.0 if name == self.params.keep_best else -1.0
        if curve and not any(name in row for row in curve):
            raise InputError(
                f"params.yaml: checkpoint.keep_best: the curve has no {name}; it has "
                f"{', '.join(curve[-1])}"
            )
        following = {path: int(path.name.removeprefix("update-")) for path in self.saved()}
        judged = [
            (sign * curve[row][name], path)
            for path, row in following.items()
            if row < len(curve) and name in curve[row]
        ]
        return max(judged, key=lambda pair: pair[0])[1] if judged else None

    def best_weights(self, curve: list[dict[str, float]]) -> dict[str, torch.Tensor] | None:
        """The master weights of the best checkpoint; None where none is asked for or judged, and
        in processes that write nothing."""
        path = self.best(curve) if self.processes.main else None
        if path is None:
            return None
        self._checked(path)
        weights: dict[str, torch.Tensor] = load_file(path / "weights.safetensors")
        return weights

    def prune(self, curve: list[dict[str, float]]) -> None:
        """Remove all but the last `keep_last` and the best."""
        kept = {*self.saved()[-self.params.keep_last :], self.best(curve)}
        for path in self.saved():
            if path not in kept:
                remove_folder(path)

    def _checked(self, path: Path) -> Manifest:
        try:
            manifest: Manifest = read_json(path / MANIFEST)
            files = manifest["files"]
        except (InputError, KeyError, TypeError):
            raise DamagedError(f"{path}: a damaged checkpoint: no whole {MANIFEST}") from None
        for name, known in files.items():
            file = path / name
            size = file.stat().st_size if file.exists() else None
            if size is None:
                raise DamagedError(f"{file}: a damaged checkpoint: the file is absent")
            if size != known["bytes"]:
                raise DamagedError(
                    f"{file}: a damaged checkpoint: cut off at {size} of {known['bytes']} bytes"
                )
            if sha256(file) != known["sha256"]:
                raise DamagedError(f"{file}: a damaged checkpoint: its content changed")
        return manifest

    def _last_words(self) -> str:
        whole = self.saved()
        kept = f"{whole[-1]} is whole and" if whole else "no earlier one;"
        return f"{kept} the run continues there once there is room"


class DamagedError(CheckpointError):
    """A file of a checkpoint is absent, cut off or changed."""


def random_state() -> RandomState:
    """The state of every global random generator, as JSON."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": (version, internal, gauss),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(s) for s in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
    }


def set_random_state(state: RandomState) -> None:
    """Put `random_state()` back. GPUs that are not there any more are left out."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, place, spare, number = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), place, spare, number))
    torch.set_rng_state(_tensor(state["torch"]))
    for device, text in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(_tensor(text), device)


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
