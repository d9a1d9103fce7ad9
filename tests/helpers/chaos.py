"""Kill training at random instants, again and again, and compare what comes out in the end.

    PYTHONPATH=tests python -m helpers.chaos --kills 100

Both training stages run whole once; then each is started, killed with SIGKILL and started again
until it ends, as often as it takes to use up the kills. Every finished run must have written the
bytes of the undisturbed one. A child is forked for every start from a process that has imported
everything, so a start costs no import; some kills wait for a checkpoint or an output being written.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import helpers.environment  # noqa: F401 - before torch
from helpers.paths import ROOT, SHIPPED
from helpers.tables import write_prompts
from helpers.tiny_model import write_tiny_model

os.environ["OMP_NUM_THREADS"] = "1"  # a forked child must not share a pool of threads

STAGES = ("train_offline", "train_online")
WHOLE_RUNS = 2  # the second tells how long a warm one takes, and that equal runs are equal


def prepare(folder: Path) -> None:
    """A model, its prompts and annotated rollouts, and parameters of a few seconds' training."""
    import yaml

    from entrograd.storage.tables import write_table

    # Digits only, so that answers are compared as numbers: no grading process starts.
    write_tiny_model(folder / "model", characters="0123456789 =\n")
    params = yaml.safe_load(SHIPPED.read_text())
    checkpoint = {"keep_best": "reward_mean"}
    params["rollout"].update(group_size=4, dtype="float32")
    params["rollout"]["sampling"].update(max_new_tokens=3)
    params["train_offline"].update(
        epochs=4,
        prompts_per_update=2,
        dtype="float32",
        optimizer={"lr": 0.01, "schedule": "cosine"},
    )
    params["train_offline"]["checkpoint"] = checkpoint
    params["train_online"].update(
        rounds=5, prompts_per_round=4, epochs_per_round=2, dtype="float32", optimizer={"lr": 0.01}
    )
    params["train_online"]["checkpoint"] = checkpoint
    often = {"checkpoint": {"max_fraction": 1.0}}
    params["execution"] = {"train_offline": often, "train_online": often}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    write_prompts(folder / "prompts.parquet", 10)
    draw = random.Random(0)
    annotated = []
    for prompt in range(6):
        for sample in range(4):
            ids = [draw.randrange(3, 16) for _ in range(draw.randrange(1, 4))]
            right = float(draw.random() < 0.5)
            annotated.append(
                {
                    "prompt_id": f"id{prompt}",
                    "sample_index": sample,
                    "prompt_ids": [5, 6, 3 + prompt],
                    "completion_ids": ids,
                    "completion_text": "x",
                    "finish_reason": "stop",
                    "seed": 0,
                    "policy_version": "v",
                    "answer": str(right),
                    "reward": right,
                    "reward_status": "ok",
                    "old_logprobs": [-3.0 + draw.random() for _ in ids],
                    "entropies": [2.0 + draw.random() for _ in ids],
                    "cluster_id": int(right),
                }
            )
    for row in annotated:
        row.update(sampling_logprobs=None, reward_heads=None, segment_ids=None)
    write_table(folder / "annotated.parquet", annotated, "annotated")


def outputs(stage: str, place: Path) -> dict[str, Path]:
    """The stage's outputs by argument."""
    names = ("out", "curve") if stage == "train_offline" else ("out", "rounds", "curve")
    return {name: place / name for name in names}


def command(stage: str, inputs: Path, place: Path) -> list[str]:
    """The stage's script and arguments: inputs of `prepare`, outputs and work in `place`."""
    data = {
        "train_offline": ("--annotated", "annotated.parquet"),
        "train_online": ("--prompts", "prompts.parquet"),
    }[stage]
    words = [str(ROOT / "stages" / f"{stage}.py"), data[0], str(inputs / data[1])]
    words += ["--params", str(inputs / "params.yaml"), "--model", str(inputs / "model")]
    words += ["--reward-heads", "", "--timings", "", "--work", str(place / "work")]
    for name, path in outputs(stage, place).items():
        words += [f"--{name}", str(path)]
    return words


def start(
    stage: str, inputs: Path, place: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> int:
    """Fork a child that runs the stage's own script; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(place)
        os.environ.update(environment)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = command(stage, inputs, place)
        runpy.run_path(str(ROOT / "stages" / f"{stage}.py"), run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int | None:
    """The exit code of a child (negative: the signal), None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return None if not pid else os.waitstatus_to_exitcode(status)


def finish(child: int, place: Path) -> None:
    """Wait for a child that nobody kills."""
    check(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), place)


def check(code: int, place: Path) -> None:
    """SystemExit with its log where a run failed by itself."""
    if code:
        log = (place / "log.txt").read_text()[-2000:]
        raise SystemExit(f"chaos: a run that nobody killed ended with {code}:\n{log}")


def kill_when(child: int, place: Path, now: Callable[[], bool]) -> bool:
    """SIGKILL the child as soon as `now()`; False where it ended before."""
    while (code := ended(child)) is None:
        if now():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.0002)
    check(code, place)
    return False


def instant(draw: random.Random, seconds: float, place: Path) -> Callable[[], bool]:
    """When to kill: at a random time of the run, or while something is being written."""
    kind = draw.choice(["time", "time", "checkpoint", "output"])
    if kind == "time":
        until = time.monotonic() + draw.uniform(0, seconds)
        return lambda: time.monotonic() >= until
    pattern = "work/*/checkpoints/.update-*" if kind == "checkpoint" else ".out.????????.tmp"
    seen: set[Path] = set()
    which = draw.randint(1, 3) if kind == "checkpoint" else 1
    delay = draw.uniform(0, 0.01)

    def writing() -> bool:
        seen.update(place.glob(pattern))
        if len(seen) < which:
            return False
        time.sleep(delay)
        return True

    return writing


def chaos(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """The counts of a run of `kills` kills, and whether all outputs were equal."""
    from entrograd.storage.hashing import sha256

    draw = random.Random(seed)
    inputs = folder / "inputs"
    inputs.mkdir()
    prepare(inputs)
    counts: dict[str, Any] = {"kills": 0, "inside_a_checkpoint": 0, "resumed": 0, "finished": 0}
    counts["differing"] = []
    for number, stage in enumerate(STAGES):
        whole: list[dict[str, str]] = []
        for trial in range(WHOLE_RUNS):
            place = folder / f"{stage}-whole-{trial}"
            place.mkdir()
            begin = time.monotonic()
            finish(start(stage, inputs, place), place)
            seconds = time.monotonic() - begin
            whole.append({n: sha256(p) for n, p in outputs(stage, place).items()})
        assert whole[0] == whole[1], f"{stage}: two undisturbed runs differ"
        share = kills // 2 + (kills % 2 if number == 0 else 0)
        killed = trial = 0
        while killed < share:
            place = folder / f"{stage}-{trial}"
            place.mkdir()
            done = False
            while not done and killed < share:
                child = start(stage, inputs, place)
                done = not kill_when(child, place, instant(draw, seconds, place))
                killed += not done
                counts["inside_a_checkpoint"] += any(
                    not path.name.endswith(".removed")
                    for path in place.glob("work/*/checkpoints/.update-*")
                )
            if not done:
                finish(start(stage, inputs, place), place)
            counts["finished"] += 1
            counts["resumed"] += (place / "log.txt").read_text().count("continuing after update")
            found = {name: sha256(path) for name, path in outputs(stage, place).items()}
            if found != whole[0]:
                counts["differing"].append(f"{stage} trial {trial}: {found} instead of {whole[0]}")
            left = [path.name for path in (*place.glob("work/*"), *place.glob(".*.tmp"))]
            if left:
                counts["differing"].append(f"{stage} trial {trial}: left {left}")
            shutil.rmtree(place)
            trial += 1
        counts["kills"] += killed
    return counts


def preload() -> None:
    """Import what the stages import, and compute nothing: threads would not survive a fork."""
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401 - the library loads it when asked

    import entrograd.train.offline
    import entrograd.train.online  # noqa: F401

    torch.set_num_threads(1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    preload()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = chaos(arguments.kills, arguments.seed, Path(folder))
    print(json.dumps({**counts, "seconds": round(time.monotonic() - begin, 1)}))
    return 1 if counts["differing"] else 0


if __name__ == "__main__":
    sys.exit(main())
