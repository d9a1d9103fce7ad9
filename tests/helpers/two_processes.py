"""Train on one and on two processes, kill one kind and finish with the other; into FOLDER:

    PYTHONPATH=tests python -m helpers.two_processes FOLDER

The processes are forked, with the environment that a launcher gives them, from one that has
imported everything. tests/test_processes.py compares what they wrote.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from helpers.chaos import STAGES, finish, preload, prepare, start
from helpers.tiny_model import write_tiny_model

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def launch(
    stage: str, inputs: Path, place: Path, count: int, environment: Mapping[str, str]
) -> list[int]:
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
        start(
            stage,
            inputs,
            place,
            {**common, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]


def killed_after(update: int, children: list[int], place: Path) -> None:
    """SIGKILL the processes once the checkpoint after `update` is there."""
    while not list(place.glob(f"work/*/checkpoints/update-{update:08d}/manifest.json")):
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
    # AdamW divides by the size of a gradient: where that is rounding, the order of sums decides
    # the sign of an update of size lr. At the 0.01 of chaos.py it outgrows what is compared.
    calm = variant(inputs, "calm", train_online={"optimizer": {"lr": 0.0005}})
    reference = write_tiny_model(inputs / "other", seed=5, characters="0123456789 =\n")
    penalty = variant(
        inputs,
        "penalty",
        method={"name": "grpo", "grpo": {"kl_coefficient": 0.3}},
        train_offline={"reference": str(reference)},
    )
    # Parts of weights mean no shared prompts, and another order of sums drifts apart under AdamW.
    # Few tokens a pass: the processes have different numbers of them.
    apart = {"share_prompts": False}
    few = {"token_budget": 12, "checkpoint": {"max_fraction": 1.0}}
    plain = variant(
        inputs,
        "plain",
        train_offline=apart,
        train_online=apart,
        execution={"train_offline": few, "train_online": few},
    )
    again = {"lr": 0.01, "gradient_checkpointing": True}
    untied = variant(plain, "untied", train_offline={"optimizer": again})
    (untied / "model").unlink()
    write_tiny_model(untied / "model", characters="0123456789 =\n+", tied=False)  # 17 tokens

    def whole(stage: str, inputs: Path, name: str, count: int, **environment: str) -> None:
        place = folder / name
        for child in launch(stage, inputs, place, count, environment):
            finish(child, place)

    whole("train_offline", penalty, "penalty-1", 1)
    whole("train_offline", penalty, "penalty-2", 2)
    adapters = variant(inputs, "adapters", train_online={"lora": {"rank": 4}})
    whole("train_online", adapters, "adapters-1", 1)
    whole("train_online", adapters, "adapters-2", 2)
    whole("train_offline", untied, "untied-1", 1)
    whole("train_offline", untied, "untied-sharded", 2, **SHARDED)
    for stage in STAGES:
        whole(stage, calm, f"{stage}-1", 1)
        whole(stage, calm, f"{stage}-2", 2)
        whole(stage, plain, f"{stage}-plain-1", 1)
        whole(stage, plain, f"{stage}-plain-sharded", 2, **SHARDED)
    for name, given, first, then in (
        ("train_online", calm, (1, {}), (2, {})),
        ("train_online", calm, (2, {}), (1, {})),
        ("train_online-plain", plain, (1, {}), (2, SHARDED)),
        ("train_online-plain", plain, (2, SHARDED), (1, {})),
    ):
        place = folder / f"{name}-{first[0]}-{then[0]}"
        killed_after(3, launch("train_online", given, place, *first), place)
        whole("train_online", given, place.name, then[0], **then[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
