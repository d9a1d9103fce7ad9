"""Train on one and on two processes, kill one kind and finish with the other; into FOLDER:

    python tests/two_processes.py FOLDER

The processes are forked, with the environment that a launcher gives them, from one that has
imported everything. tests/test_processes.py compares what they wrote.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from chaos import STAGES, finish, preload, prepare, start
from conftest import write_tiny_model


def launch(stage: str, inputs: Path, place: Path, count: int) -> list[int]:
    """Start the stage on `count` processes; their ids, the first's first."""
    place.mkdir(exist_ok=True)
    if count == 1:
        return [start(stage, inputs, place)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": str(count)}
    return [
        start(stage, inputs, place, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]


def killed_after(update: int, children: list[int], place: Path) -> None:
    """SIGKILL the processes once the checkpoint after `update` is there."""
    while not list(place.glob(f"work/*/checkpoints/step-{update:08d}/manifest.json")):
        time.sleep(0.002)
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)


def variant(inputs: Path, name: str, **sections: Any) -> Path:
    """The inputs with other parameters, in the folder `name` beside them."""
    folder = inputs.with_name(name)
    folder.mkdir()
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)
    params = yaml.safe_load((inputs / "params.yaml").read_text())
    for section, block in sections.items():
        params[section] = block if section == "method" else {**params[section], **block}
    (folder / "params.yaml").unlink()
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


def main(folder: Path) -> None:
    preload()
    inputs = folder / "inputs"
    inputs.mkdir()
    prepare(inputs)
    reference = write_tiny_model(inputs / "other", seed=5, characters="0123456789 =\n")
    penalty = variant(
        inputs,
        "penalty",
        method={"name": "grpo", "grpo": {"kl_coefficient": 0.3}},
        train_offline={"reference": str(reference)},
    )
    for count in (1, 2):
        place = folder / f"penalty-{count}"
        for child in launch("train_offline", penalty, place, count):
            finish(child, place)
    for stage in STAGES:
        for count in (1, 2):
            place = folder / f"{stage}-{count}"
            for child in launch(stage, inputs, place, count):
                finish(child, place)
    for first, then in ((1, 2), (2, 1)):
        place = folder / f"train_online-{first}-{then}"
        killed_after(3, launch("train_online", inputs, place, first), place)
        for child in launch("train_online", inputs, place, then):
            finish(child, place)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
