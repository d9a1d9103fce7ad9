"""The attention of training on a CPU, against sums in plain Python and torch's own attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from entrograd.models.cpu import attention
from entrograd.models.cpu.attention import Rows, SharedAttention, rows_by_prompt
from entrograd.models.forward import score
from entrograd.models.load import load_model

SCALE = 0.3


def states(seed: int, places: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """query, keys, values, prompt_keys, prompt_values: 5 rows, 2 query heads a key head, 3 prompts
    of up to 4 tokens."""
    torch.manual_seed(seed)
    shapes = [(5, 4, places, 8), *[(5, 2, places, 8)] * 2, *[(3, 2, 4, 8)] * 2]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


PROMPTS = [(0, 4), (0, 4), (1, 1), (2, 3), (2, 3)]  # of each row: its place and length
WHERE = rows_by_prompt([0, 0, 1, 2, 2], [4, 1, 3])


def whole_rows(
    query: Tensor, keys: Tensor, values: Tensor, *prompts: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A row at a time: its queries, all keys and values of each query head, and what is seen."""
    for row, (prompt, length) in enumerate(PROMPTS):
        key, value = (
            torch.cat([of_prompts[prompt, :, :length], own[row]], 1).repeat_interleave(2, 0)
            for of_prompts, own in zip(prompts, (keys, values), strict=True)
        )
        count = query.shape[2]
        yield query[row], key, value, torch.ones(count, length + count).bool().tril(length)


def plain(*given: Tensor) -> Tensor:
    """torch's attention, a row at a time, on repeated keys."""
    return torch.stack(
        [
            scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=SCALE)
            for query, key, value, seen in whole_rows(*given)
        ]
    )


def test_rows_by_prompt() -> None:
    expected = [Rows(slice(0, 2), 0, 4), Rows(slice(2, 3), 1, 1), Rows(slice(3, 5), 2, 3)]
    assert expected == WHERE


def test_values_by_hand() -> None:
    query, keys, values, prompt_keys, prompt_values = (t.detach() for t in states(0, 3))
    got = SharedAttention.apply(query, keys, values, prompt_keys, prompt_values, WHERE, SCALE)
    for row, head, place in ((0, 0, 0), (1, 3, 2), (2, 1, 1), (4, 2, 2)):
        prompt, length = PROMPTS[row]
        of_head = head // 2
        seen = [
            [*past[prompt, of_head, :length].tolist(), *own[row, of_head, : place + 1].tolist()]
            for past, own in ((prompt_keys, keys), (prompt_values, values))
        ]
        scores = [
            SCALE
            * math.fsum(a * b for a, b in zip(query[row, head, place].tolist(), k, strict=True))
            for k in seen[0]
        ]
        weights = [math.exp(s) / math.fsum(map(math.exp, scores)) for s in scores]
        want = [
            math.fsum(w * v[d] for w, v in zip(weights, seen[1], strict=True)) for d in range(8)
        ]
        torch.testing.assert_close(
            got[row, head, place], torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(("places", "queries", "scores"), [(1, 128, 1), (7, 3, 1), (7, 128, 200)])
def test_values_and_gradients_whatever_the_blocks(
    monkeypatch: pytest.MonkeyPatch, places: int, queries: int, scores: int
) -> None:
    monkeypatch.setattr(attention, "BLOCK_QUERIES", queries)
    monkeypatch.setattr(attention, "BLOCK_SCORES", scores)
    ours, theirs = states(1, places), states(1, places)
    got, want = SharedAttention.apply(*ours, WHERE, SCALE), plain(*theirs)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


def test_long_rows_in_default_blocks() -> None:
    ours, theirs = states(2, 300), states(2, 300)
    got, want = SharedAttention.apply(*ours, WHERE, SCALE), plain(*theirs)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    got.sum().backward()
    want.sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-11)


def test_no_prompt() -> None:
    query, keys, values, *_ = states(3, 6)
    nothing = keys[:1, :, :0]
    whole = [Rows(slice(0, 5), 0, 0)]
    got = SharedAttention.apply(query, keys, values, nothing, nothing, whole, SCALE)
    want = scaled_dot_product_attention(
        query,
        keys.repeat_interleave(2, 1),
        values.repeat_interleave(2, 1),
        is_causal=True,
        scale=SCALE,
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("places", [20, 200])
def test_bfloat16_is_as_near_to_the_truth_as_eager_attention(places: int) -> None:
    """Eager: scores and weights rounded to bfloat16, softmax in float32, as transformers has it."""

    def eager(*given: Tensor) -> Tensor:
        rows = []
        for query, key, value, seen in whole_rows(*given):
            scores = (query @ key.transpose(-1, -2) * SCALE).float()
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            rows.append(weights.to(value.dtype) @ value)
        return torch.stack(rows)

    given = states(4, places, torch.bfloat16)
    truth = plain(*[t.detach().double() for t in given])

    def distance(result: Any) -> float:
        return float((result.detach().double() - truth).abs().mean())

    ours = SharedAttention.apply(*given, WHERE, SCALE)
    assert distance(ours) < 1.05 * distance(eager(*given))


def test_threads_take_turns(tiny_model: Path) -> None:
    """Many forward passes of one model at a time: each gets the result it gets alone."""
    model = load_model(tiny_model, "float32", "cpu")
    rows = [[5 + i % 60, 6, 7, 8] for i in range(300)]
    alone = [score(model, [row[:2]], [row[2:]], 1.0, 64) for row in rows]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda row: score(model, [row[:2]], [row[2:]], 1.0, 64), rows))
    assert np.array_equal(together, alone)
    assert model.config._attn_implementation == "sdpa"
