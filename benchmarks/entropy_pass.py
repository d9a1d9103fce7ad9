"""Token entropies and logprobs of stage annotate against a plain forward with full logits.

Two sets of completions, their lengths a geometric series from 16 to 256 tokens behind prompts of
96: `groups`, 8 completions of each prompt as rollouts are, and `single`, one each. Each is cut into
the same batches for all sides:

- ours: `entrograd.models.forward.completion_logprobs`, logprob and entropy without logits;
- plain: the model's own forward to logits [B, T, V] in float32, log-softmax, logprob, entropy;
- bare: that forward to logits and nothing else.

Sides take turns in one process; ratios are of median seconds, above 1 where ours is faster. Peak
memory is that of a process of its own a side, beyond what it held with the model loaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from entrograd.models.forward import batches, completion_logprobs
from entrograd.models.load import load_model
from entrograd.models.prefix import pad
from entrograd.storage.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SETS = {"groups": (1, 8), "single": (4, 1)}  # prompts, completions per prompt; times --scale
PROMPT, SHORTEST, LONGEST = 96, 16, 256

Data = tuple[list[list[int]], list[list[int]]]


def completions(name: str, vocabulary: int, scale: int) -> Data:
    """Prompts (one per completion) and completions of random tokens; the lengths mixed."""
    prompts, samples = SETS[name][0] * scale, SETS[name][1]
    draw, count = np.random.default_rng(0), prompts * samples
    lengths = np.geomspace(SHORTEST, LONGEST, count).round().astype(int)
    lengths = lengths[draw.permutation(count)]
    texts = draw.integers(0, vocabulary, (prompts, PROMPT)).tolist()
    return (
        [texts[row // samples] for row in range(count)],
        [draw.integers(0, vocabulary, length).tolist() for length in lengths],
    )


def ours(
    model: PreTrainedModel, prompts: list[list[int]], texts: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """The library's pass."""
    return completion_logprobs(model, prompts, texts, 1.0)


def bare(
    model: PreTrainedModel, prompts: list[list[int]], texts: list[list[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and logits of whole sequences."""
    ids, mask = pad([[*p, *c] for p, c in zip(prompts, texts, strict=True)], model.device)
    return ids, mask, model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits


def plain(
    model: PreTrainedModel, prompts: list[list[int]], texts: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Logprobs and entropies out of full logits, as one writes it down."""
    ids, mask, logits = bare(model, prompts, texts)
    table = logits[:, :-1].float().log_softmax(-1)
    del logits
    logprobs = table.gather(-1, ids[:, 1:, None])[..., 0]
    entropies = -(table.exp() * table).sum(-1)
    starts = torch.tensor([len(p) - 1 for p in prompts], device=ids.device)
    wanted = mask[:, 1:] & (torch.arange(ids.shape[1] - 1, device=ids.device) >= starts[:, None])
    return logprobs[wanted], entropies[wanted]


SIDES: dict[str, Callable[..., tuple[Tensor, ...]]] = {"ours": ours, "plain": plain, "bare": bare}


def run(side: str, model: PreTrainedModel, data: Data, budget: int) -> float:
    """Seconds of all batches of `data` on one side."""
    prompts, texts = data
    start = time.perf_counter()
    with torch.inference_mode():
        for rows in batches(prompts, texts, budget):
            SIDES[side](model, [prompts[i] for i in rows], [texts[i] for i in rows])
    return time.perf_counter() - start


def check_equal(model: PreTrainedModel, data: Data) -> float:
    """The largest difference between ours and plain, over a few completions."""
    with torch.inference_mode():
        few = data[0][:4], data[1][:4]
        pairs = zip(ours(model, *few), plain(model, *few), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)


def peak(side: str, model: PreTrainedModel, data: Data, budget: int) -> float:
    """MiB this process held at most while running, beyond what it held before (Linux); a small run
    before it warms what libraries keep for good."""
    run(side, model, (data[0][:1], [data[1][0][:16]]), budget)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: loading had its own
    before = _memory("VmRSS")
    run(side, model, data, budget)
    return (_memory("VmHWM") - before) / 1024


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(folder: str, dtype: str, budget: int, rounds: int, scale: int) -> dict[str, Any]:
    """Ratios and memory of each set of completions."""
    model = load_model(folder, dtype, "auto")
    vocabulary = model.get_input_embeddings().num_embeddings
    result: dict[str, Any] = {"model": folder, "dtype": str(model.dtype).removeprefix("torch.")}
    result |= {"token_budget": budget, "scale": scale, "threads": torch.get_num_threads()}
    result["sets"] = {}
    for name in SETS:
        data = completions(name, vocabulary, scale)
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for side in SIDES:
            run(side, model, (data[0][:2], data[1][:2]), budget)  # warms up
        for _ in range(rounds):
            for side in SIDES:
                seconds[side].append(run(side, model, data, budget))
        median = {side: statistics.median(values) for side, values in seconds.items()}
        memory = {side: child(side, name, folder, dtype, budget, scale) for side in SIDES}
        found = {
            "seconds": {side: [round(v, 3) for v in values] for side, values in seconds.items()},
            "ratio_entropy": round(median["plain"] / median["ours"], 3),
            "ratio_bare": round(median["bare"] / median["ours"], 3),
            "memory_mib": memory,
            "largest_difference": check_equal(model, data),
        }
        result["sets"][name] = found
        spread = max(max(v) / min(v) - 1 for v in seconds.values())
        print(
            f"{name}: {found['ratio_entropy']:.2f}x of plain with full logits, "
            f"{found['ratio_bare']:.2f}x of the bare forward (spread {spread:.0%}); memory "
            + ", ".join(f"{side} {mib} MiB" for side, mib in memory.items()),
            flush=True,
        )
    return result


def child(side: str, name: str, folder: str, dtype: str, budget: int, scale: int) -> int:
    """`peak` of a side in a process of its own."""
    command = [sys.executable, __file__, "--model", folder, "--dtype", dtype]
    command += ["--token-budget", str(budget), "--scale", str(scale), "--peak", side, name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return round(float(done.stdout.splitlines()[-1]))


def main() -> int:
    """Run, print, add to the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/base", help="model folder (models/base)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--token-budget", type=int, default=4096, help="of a batch (4096)")
    parser.add_argument("--scale", type=int, default=4, help="size of both sets (4)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (3)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/annotate.json"))
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "SET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        model = load_model(options.model, options.dtype, "auto")
        side, name = options.peak
        vocabulary = model.get_input_embeddings().num_embeddings
        data = completions(name, vocabulary, options.scale)
        print(peak(side, model, data, options.token_budget))
        return 0
    sizes = options.token_budget, options.rounds, options.scale
    found = measure(options.model, options.dtype, *sizes)
    sets = found["sets"].values()
    ratios = {
        "ratio_entropy": min(item["ratio_entropy"] for item in sets),
        "ratio_bare": min(item["ratio_bare"] for item in sets),
        "ratio_memory": round(
            max(item["memory_mib"]["ours"] / item["memory_mib"]["plain"] for item in sets), 3
        ),
    }
    known = read_json(options.out) if options.out.exists() else {}
    write_json(options.out, {**known, **ratios, "entropy": found})
    print(json.dumps(ratios))
    return 0


if __name__ == "__main__":
    sys.exit(main())
