"""The whole step in float64: any division of a batch gives the same update, and 20 updates of
every method are what they were when they were last looked at (tests/golden)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from entrograd.methods.presets import PRESETS
from entrograd.train import forward_backward, step
from entrograd.train.batch import Examples
from entrograd.train.optimizer import Optimizer
from entrograd.train.params import Optimizer as OptimizerParams
from entrograd.train.policy import Policy
from golden.make import FOLDER, SETTINGS, UPDATES, batch, choose, float64_model, trajectory

EVERY = pytest.mark.parametrize("name", list(PRESETS))


def eight(seed: int) -> Examples:
    """Two groups of four."""
    whole = batch(seed)
    first = torch.arange(8)
    return Examples(whole.prompt_ids[:8], whole.completion_ids[:8], whole.batch.select(first))


@EVERY
def test_any_division_of_the_batch_is_the_same_update(
    name: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 x 8, 2 x 4 and 8 x 1 rows a pass, with and without sharing the prompt: loss, gradient
    norm and every updated weight agree to 1e-10."""
    results: list[tuple[dict[str, float], dict[str, Any]]] = []
    for shared in (True, False):
        settings = replace(SETTINGS, share_prompts=shared)
        for size in (8, 4, 1):
            parts = list(torch.arange(8).split(size))
            monkeypatch.setattr(forward_backward, "micro_batches", lambda *_, parts=parts: parts)
            subject = float64_model(tiny_model)
            optimizer = Optimizer(subject, {}, OptimizerParams(lr=1e-3), 1)
            collected: dict[str, Any] = {}

            def keep(norm: float, optimizer: Any = optimizer, into: Any = collected) -> None:
                into.update({n: m.grad.clone() for n, m in optimizer.masters.items()})
                Optimizer.step(optimizer, norm)

            monkeypatch.setattr(optimizer, "step", keep)
            measured = step.train_step(Policy(subject, optimizer), choose(name), eight(5), settings)
            results.append((measured, collected))
    first, gradient = results[0]
    assert first["grad_norm"] > 0
    for measured, other in results[1:]:
        assert measured.keys() == first.keys()
        for key, value in first.items():
            assert measured[key] == pytest.approx(value, rel=1e-10, abs=1e-10), key
        for key, value in gradient.items():
            assert value.dtype == torch.float64
            assert (other[key] - value).abs().max() < 1e-10, key


@EVERY
def test_golden_trajectory(name: str, tiny_model: Path) -> None:
    """Relative 1e-6: rotary angles are float32 in transformers, and processors differ in them."""
    golden = json.loads((FOLDER / f"{name}.json").read_text())
    assert len(golden) == UPDATES
    for number, (now, then) in enumerate(zip(trajectory(name, tiny_model), golden, strict=True)):
        for key in ("loss", "grad_norm"):
            assert now[key] == pytest.approx(then[key], rel=1e-6, abs=1e-9), (number, key)
    assert any(row["grad_norm"] > 0 for row in golden)
