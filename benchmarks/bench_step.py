"""One online step against TRL 1.16.0's GRPOTrainer on the CPU (`make bench-step`).

The same model, prompts, group size, 16 completions of the same fixed length, reward, loss (GRPO,
beta 0) and optimiser. Each side is a process of its own; they take turns, after one step each to
warm up. TRL computes in whichever of its dtypes took the least time in that first step. Phases:
TRL has no scoring pass on policy, only rewards and advantages; our scoring is the forward pass
that the update differentiates, so scoring and update are compared together.

The roofline: the step's floating-point operations (work.py counts what the task needs, each prompt
once) over the seconds, as a share of the rate at which this machine multiplies two 2048 x 2048
matrices. CPU seconds say more than seconds where other processes run, with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from work import product_rate

from entrograd.models.load import load_tokenizer, resolve_dtype
from entrograd.storage.files import write_json

HERE = Path(__file__).parent
# step_trl.py says what each is.
SETTINGS = ("float32", "bfloat16_autocast", "bfloat16")
SHAPES = ("200/32/8", "40/128/8")
GOALS = {"200/32/8": 8.0, "40/128/8": 3.0}


class Side:
    """A process that makes one step a turn."""

    def __init__(self, python: str, script: str, options: dict[str, object]) -> None:
        self.script = script
        self.process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(options)],
            env={**os.environ, "PYTHONPATH": str(HERE.parent / "src")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("VERBOSE") else None,
            text=True,
            bufsize=1,
        )
        self._line("ready")

    def turn(self) -> dict[str, Any]:
        """Make one step; what it measured."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        result: dict[str, Any] = json.loads(self._line("{"))
        return result

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)

    def _line(self, start: str) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(start):
                return line
        raise SystemExit(f"{self.script} ended; VERBOSE=1 shows why")


def prompts(folder: str, length: int, count: int) -> list[list[int]]:
    """Random words, each one token, `length` of them; text and tokens determine each other."""
    tokenizer = load_tokenizer(folder)
    words = sorted(t for t in tokenizer.get_vocab() if t[0] == "\u0120" and t[1:].isalpha())
    words = [t for t in words if t.isascii() or t[1:].isascii()]
    rng = random.Random(length)
    found: list[list[int]] = []
    while len(found) < count:
        ids = tokenizer.convert_tokens_to_ids([rng.choice(words) for _ in range(length)])
        if tokenizer(tokenizer.decode(ids))["input_ids"] == ids:
            found.append(ids)
    return found


def compare(options: argparse.Namespace, shape: str) -> dict[str, Any]:
    """Both sides on one shape, taking turns."""
    prompt, completion, group = map(int, shape.split("/"))
    ids = prompts(options.model, prompt, 16)
    tokenizer = load_tokenizer(options.model)
    common = {"model": options.model, "group": group, "completion": completion}
    ours = Side(sys.executable, "step_ours.py", {**common, "dtype": options.dtype, "prompts": ids})
    ours.turn()
    texts = {"texts": [tokenizer.decode(row) for row in ids], "prompt": prompt}
    first: dict[str, float] = {}
    trl: Side | None = None
    slower: Side | None
    for setting in options.trl_settings:
        side = Side(options.trl_python, "step_trl.py", {**common, **texts, "setting": setting})
        first[setting] = _total(side.turn()[options.clock])
        print(f"{shape}: TRL {setting}: {first[setting]:.1f} s in its first step", flush=True)
        if first[setting] == min(first.values()):
            slower, trl = trl, side
        else:
            slower = side
        if slower:
            slower.close()
    assert trl is not None
    turns: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for turn in range(options.rounds):
        for name, side in (("ours", ours), ("trl", trl)):
            turns[name].append(side.turn())
            seconds = _total(turns[name][-1][options.clock])
            print(f"{shape}: turn {turn + 1}: {name} {seconds:.2f} s", flush=True)
    ours.close()
    trl.close()
    return summary(options, (prompt, completion, group), turns, first)


def summary(
    options: argparse.Namespace,
    shape: tuple[int, int, int],
    turns: dict[str, list[dict[str, Any]]],
    first: dict[str, float],
) -> dict[str, Any]:
    """Medians, ratios, spread and the share of the product rate."""
    clock = options.clock
    phases: dict[str, Any] = {}
    for phase in ("generation", "scoring", "update", "scoring+update", "total"):
        parts = ("generation", "scoring", "update") if phase == "total" else phase.split("+")
        times = {n: [sum(t[clock][p] for p in parts) for t in turns[n]] for n in turns}
        medians = {name: statistics.median(values) for name, values in times.items()}
        phases[phase] = {
            **medians,
            "ratio": medians["trl"] / medians["ours"],
            "spread": {n: (max(v) - min(v)) / medians[n] for n, v in times.items()},
        }
    last = turns["ours"][-1]
    counter = time.process_time if clock == "cpu_seconds" else time.perf_counter
    rate = product_rate(getattr(torch, last["dtype"]), torch.device("cpu"), clock=counter)
    seconds = phases["scoring+update"]["ours"]
    return {
        "prompt": shape[0],
        "completion": shape[1],
        "group": shape[2],
        "ratio_total": phases["total"]["ratio"],
        "phases": phases,
        "spread": phases["total"]["spread"],
        "clock": clock,
        "threads": last["threads"],
        "ours_dtype": last["dtype"],
        "trl_setting": min(first, key=lambda name: first[name]),
        "trl_first_step": first,
        "peak_mb": {name: max(t["peak_mb"] for t in turns[name]) for name in turns},
        "roofline": {
            "flops": last["flops"],
            "product_rate": rate,
            "share": last["flops"] / seconds / rate,
            "tokens_per_second": last["decoder_tokens"] / seconds,
        },
    }


def report(shape: dict[str, Any]) -> str:
    """The lines for a person."""
    name = f"{shape['prompt']}/{shape['completion']}/{shape['group']}"
    goal = f" (goal {GOALS[name]:.0f}x)" if name in GOALS else ""
    lines = [
        f"prompt {shape['prompt']}, completion {shape['completion']}, group {shape['group']}, "
        f"{shape['threads']} threads; ours {shape['ours_dtype']}, TRL {shape['trl_setting']}",
        f"  {'phase':16}{'ours s':>9}{'TRL s':>9}{'ratio':>8}   spread",
    ]
    for phase, p in shape["phases"].items():
        spread = f"{p['spread']['ours']:.0%} / {p['spread']['trl']:.0%}"
        lines.append(f"  {phase:16}{p['ours']:9.2f}{p['trl']:9.2f}{p['ratio']:7.1f}x   {spread}")
    r, peak = shape["roofline"], shape["peak_mb"]
    lines += [
        f"  total {shape['ratio_total']:.1f}x{goal}",
        f"  scoring and update: {r['flops'] / 1e12:.2f} Tflop, {r['tokens_per_second']:.0f} "
        f"tokens/s, {r['share']:.0%} of {r['product_rate'] / 1e9:.0f} Gflop/s",
        f"  peak memory: ours {peak['ours']:.0f} MB, TRL {peak['trl']:.0f} MB",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run, print, write the JSON; shapes measured before and not now are kept in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/base", help="model folder (models/base)")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="P/C/G")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (3)")
    parser.add_argument("--trl-python", default=".venv-parity/bin/python")
    parser.add_argument("--trl-settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--clock", default="seconds", choices=["seconds", "cpu_seconds"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step.json"))
    options = parser.parse_args()
    options.dtype = str(resolve_dtype(options.dtype, torch.device("cpu"))).removeprefix("torch.")
    known: dict[tuple[int, ...], dict[str, Any]] = {}
    if options.out.exists():
        for old in json.loads(options.out.read_text())["shapes"]:
            known[old["prompt"], old["completion"], old["group"]] = old
    for shape in options.shapes:
        found = compare(options, shape)
        known[tuple(map(int, shape.split("/")))] = found
        print(report(found), flush=True)
        write_json(options.out, {"shapes": list(known.values())})
    return 0


def _total(seconds: dict[str, float]) -> float:
    return sum(seconds.values())


if __name__ == "__main__":
    sys.exit(main())
