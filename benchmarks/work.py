"""What a training step must compute, counted, and how fast this machine multiplies matrices."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Tokens = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one forward and backward pass over a batch.

    A product of [m, k] and [k, n] counts 2mkn, its backward pass twice that. What an
    implementation computes more than once (a recomputed tile, a prompt repeated in its group)
    counts once: the work is that of the task.
    """

    decoder_tokens: int  # each prompt once, each completion but its last token
    completion_tokens: int
    flops: float


def step_work(
    model: PreTrainedModel, prompts: Sequence[Tokens], completions: Sequence[Tokens]
) -> Work:
    """The work of one update on completions [B] of prompts [B], equal prompts counted once."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(w.numel() for w in linear if w is not head)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * dim  # a query and key
    unique = {tuple(prompt) for prompt in prompts}
    decoder = sum(map(len, unique)) + sum(len(c) - 1 for c in completions)
    total = sum(map(len, completions))
    pairs = sum(len(p) * (len(p) + 1) / 2 for p in unique)
    pairs += sum(
        (len(c) - 1) * (len(p) + len(c) / 2) for p, c in zip(prompts, completions, strict=True)
    )
    forward = 2 * weights * decoder + 2 * head.numel() * total + attention * pairs
    return Work(decoder, total, 3 * forward)


def product_rate(
    dtype: torch.dtype,
    device: torch.device,
    size: int = 2048,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Flop/s of the best of ten products of two square matrices, in seconds of `clock`."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(11):  # the first one warms up
        _wait(device)
        start = clock()
        a @ b
        _wait(device)
        best = min(best, clock() - start)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
