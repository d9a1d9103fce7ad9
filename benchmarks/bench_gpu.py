"""One online step on a CUDA machine against plain transformers (`make bench-gpu`).

Random weights in the shape of Qwen2.5-0.5B and 1.5B, nothing is downloaded; it runs where torch,
transformers, pyarrow and this package are. Both sides take turns on the same random prompts, with
completions of the same fixed length, GRPO's loss, bfloat16 weights and AdamW on float32 masters.
The plain side is `generate` and a forward pass of every padded sequence with the logits of its
completion, in micro-batches of equal size. Ours is the engine, and one forward pass for scoring and
update. Seconds are medians. MFU is the work of the task (work.py) over the seconds and the rate at
which this card multiplies two large matrices.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from work import product_rate, step_work

from entrograd.data.groups import Completion, PromptGroup
from entrograd.environment import peak_mib
from entrograd.models.forward import completion_logprobs
from entrograd.numerics.surrogate import clipped
from entrograd.rollout.engine import Request
from entrograd.rollout.transformers_engine import TransformersEngine
from entrograd.storage.files import write_json
from entrograd.train.optimizer import Optimizer
from entrograd.train.scoring import Scoring

# vocabulary, width, feed-forward width, layers, heads, key-value heads
SHAPES = {
    "qwen2.5-0.5b": (151936, 896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": (151936, 1536, 8960, 28, 12, 2),
    "tiny": (512, 32, 64, 2, 4, 2),  # shows that the script runs
}
ADAMW: Any = SimpleNamespace(
    lr=1e-6,
    betas=(0.9, 0.95),
    eps=1e-8,
    weight_decay=0.0,
    schedule="constant",
    warmup_updates=0,
    max_grad_norm=1.0,
)


@dataclass(frozen=True)
class Task:
    """What one step computes."""

    prompts: list[tuple[int, ...]]  # a group of `group` completions each
    group: int
    completion: int
    token_budget: int

    def requests(self) -> list[Request]:
        """A request per completion."""
        return [
            Request(f"p{i}", s, p) for i, p in enumerate(self.prompts) for s in range(self.group)
        ]


class NoText:
    """Where the engine wants a tokenizer: random weights say nothing."""

    eos_token_id = None

    def decode(self, *_: object, **__: object) -> str:
        """No text."""
        return ""


def build(
    shape: str, device: torch.device, dtype: torch.dtype
) -> tuple[Qwen2ForCausalLM, Optimizer]:
    """A model of random weights and its optimiser, with float32 masters."""
    vocabulary, width, hidden, layers, heads, kv = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(config)
    model.to(device).eval()
    masters: dict[str, Tensor] = {}
    if dtype != torch.float32:
        masters = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.to(dtype)
    return model, Optimizer(model, masters, ADAMW, updates=1)


def rewards(completions: list[list[int]]) -> list[float]:
    """The fraction of odd tokens: no two completions are likely to have the same."""
    return [sum(i % 2 for i in ids) / len(ids) for ids in completions]


def advantages(completions: list[list[int]], group: int, device: torch.device) -> Tensor:
    """[B] GRPO's, by group."""
    values = torch.tensor(rewards(completions), device=device).view(-1, group)
    return ((values - values.mean(-1, True)) / (values.std(-1, keepdim=True) + 1e-4)).flatten()


def loss(logprobs: Tensor, old: Tensor, advantage: Tensor, total: int) -> Tensor:
    """GRPO's clipped surrogate of completions of one length, their share of the batch's mean."""
    return clipped((logprobs - old).exp(), advantage[:, None], 0.2, 0.2).mean(-1).sum() / total


def ours(model: Qwen2ForCausalLM, optimizer: Optimizer, task: Task) -> Callable[[Clock], None]:
    """The engine, then scoring with the graph kept, then the update."""
    tokenizer: Any = NoText()
    engine = TransformersEngine(model, tokenizer, task.token_budget * 4)
    settings: Any = SimpleNamespace(
        temperature=1.0, token_budget=task.token_budget, share_prompts=None
    )
    scoring = Scoring(model, settings, task.token_budget * 4)
    new: Any = task.completion
    sampling: Any = SimpleNamespace(
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        max_new_tokens=new,
        min_new_tokens=new,
        stop=[],
    )

    def step(clock: Clock) -> None:
        completions = engine.generate(task.requests(), sampling, 0)
        clock("generation")
        groups: dict[str, PromptGroup] = {}
        for request, sampled in zip(task.requests(), completions, strict=True):
            ids = np.array(sampled.completion_ids, np.int32)
            group = groups.setdefault(
                request.prompt_id,
                PromptGroup(request.prompt_id, np.array(request.prompt_ids, np.int32), []),
            )
            group.completions.append(Completion(len(group), ids, "", "length", 0, ""))
        prompts = [group.prompt_ids for group in groups.values() for _ in group.completions]
        drawn = [c.completion_ids.tolist() for group in groups.values() for c in group.completions]
        assert all(len(ids) == new for ids in drawn)
        graded = (c for group in groups.values() for c in group.completions)
        for completion, reward in zip(graded, rewards(drawn), strict=True):
            completion.reward = reward
        old = torch.tensor(
            np.stack([values for values, _ in scoring(list(groups.values()))]), device=model.device
        )
        advantage = advantages(drawn, task.group, model.device)
        clock("scoring")
        kept = scoring.take()
        done = set(kept.rows.tolist()) if kept else set()
        if kept:
            part = loss(
                kept.logprobs.view(-1, new), old[kept.rows], advantage[kept.rows], len(drawn)
            )
            part.backward()
            optimizer.collect()
            del kept, part
        rest = [i for i in range(len(drawn)) if i not in done]
        size = max(1, len(done))
        for low in range(0, len(rest), size):
            chosen = rest[low : low + size]
            flat, _ = completion_logprobs(
                model, [prompts[i] for i in chosen], [drawn[i] for i in chosen], 1.0
            )
            loss(flat.view(-1, new), old[chosen], advantage[chosen], len(drawn)).backward()
            optimizer.collect()
        optimizer.step(optimizer.gradient_norm())
        clock("update")

    return step


def plain(model: Any, optimizer: Optimizer, task: Task) -> Callable[[Clock], None]:
    """`generate`, then a forward pass of every whole sequence, the completion's logits kept."""
    repeated = [list(p) for p in task.prompts for _ in range(task.group)]
    ids = torch.tensor(repeated, device=model.device)
    size = max(1, task.token_budget // (ids.shape[1] + task.completion))

    def step(clock: Clock) -> None:
        with torch.no_grad():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=task.completion,
                min_new_tokens=task.completion,
                pad_token_id=0,
            )
        clock("generation")
        drawn = whole[:, ids.shape[1] :]
        advantage = advantages(drawn.tolist(), task.group, model.device)
        clock("scoring")
        for low in range(0, len(whole), size):
            rows = slice(low, low + size)
            logits = model(whole[rows], logits_to_keep=task.completion + 1).logits[:, :-1].float()
            logprobs = torch.log_softmax(logits, -1).gather(-1, drawn[rows, :, None])[..., 0]
            loss(logprobs, logprobs.detach(), advantage[rows], len(whole)).backward()
            optimizer.collect()
        optimizer.step(optimizer.gradient_norm())
        clock("update")

    return step


class Clock:
    """Seconds of each phase, after all work on the device is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def __call__(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] = now - self._last
        self._last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def compare(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides on one shape, taking turns."""
    device = torch.device(options.device)
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    size = (options.prompts, options.prompt)
    drawn = torch.randint(0, SHAPES[shape][0], size, generator=generator).tolist()
    task = Task([tuple(p) for p in drawn], options.group, options.completion, options.token_budget)
    model, optimizer = build(shape, device, dtype)
    sides = {"ours": ours(model, optimizer, task), "plain": plain(model, optimizer, task)}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    peak = dict.fromkeys(sides, 0.0)
    for turn in range(options.rounds + 1):  # the first one warms up
        for name, step in sides.items():
            clock = Clock(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            step(clock)
            peak[name] = max(peak[name], _peak_mb(device))
            if turn:
                seconds[name].append(clock.seconds)
    repeated = [p for p in task.prompts for _ in range(task.group)]
    work = step_work(model, repeated, [[0] * task.completion] * len(repeated))
    rate = product_rate(dtype, device, 8192 if device.type == "cuda" else 512)
    result: dict[str, Any] = {
        "model": shape,
        "prompt": options.prompt,
        "completion": options.completion,
        "group": options.group,
        "completions": len(repeated),
        "product_rate": rate,
        "flops": work.flops,
        "peak_mb": peak,
    }
    for name, turns in seconds.items():
        totals = [sum(turn.values()) for turn in turns]
        phases = {phase: statistics.median(turn[phase] for turn in turns) for phase in turns[0]}
        trained = phases["scoring"] + phases["update"]
        result[name] = {
            "phases": phases,
            "total": statistics.median(totals),
            "spread": (max(totals) - min(totals)) / statistics.median(totals),
            "generated_per_second": len(repeated) * task.completion / phases["generation"],
            "trained_per_second": work.decoder_tokens / trained,
            "mfu": work.flops / trained / rate,
        }
    result["ratio_total"] = result["plain"]["total"] / result["ours"]["total"]
    return result


def report(found: dict[str, Any]) -> str:
    """The lines for a person."""
    lines = [
        f"{found['model']}: {found['completions']} completions of {found['completion']} tokens on "
        f"prompts of {found['prompt']}, groups of {found['group']}; "
        f"products at {found['product_rate'] / 1e12:.2f} Tflop/s"
    ]
    for name in ("ours", "plain"):
        side = found[name]
        phases = ", ".join(f"{phase} {value:.2f} s" for phase, value in side["phases"].items())
        lines.append(
            f"  {name:6}{side['total']:8.2f} s (spread {side['spread']:.0%}): {phases}; generated "
            f"{side['generated_per_second']:.0f} tokens/s, trained "
            f"{side['trained_per_second']:.0f} tokens/s, MFU {side['mfu']:.0%}, "
            f"peak {found['peak_mb'][name]:.0f} MB"
        )
    lines.append(f"  {found['ratio_total']:.1f}x")
    return "\n".join(lines)


def main() -> int:
    """Run, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(SHAPES)[:2], choices=SHAPES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--prompts", type=int, default=8, help="groups a step (8)")
    parser.add_argument("--group", type=int, default=8, help="completions per group (8)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (512)")
    parser.add_argument("--completion", type=int, default=512, help="tokens (512)")
    parser.add_argument("--token-budget", type=int, default=16384, help="of a micro-batch (16384)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (3)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("bench-gpu: this machine shows no CUDA device; --device cpu runs it here, slowly")
        return 2
    found = []
    for shape in options.models:
        found.append(compare(shape, options))
        print(report(found[-1]), flush=True)
        gc.collect()
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    write_json(options.out, {"device": device, "versions": versions, "shapes": found})
    return 0


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return peak_mib()


if __name__ == "__main__":
    sys.exit(main())
