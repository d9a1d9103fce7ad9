"""The benchmarks' counting by hand, and that the GPU's script runs where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from entrograd.models.load import load_model
from helpers.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


def test_the_work_of_a_step_by_hand(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from work import step_work

    model = load_model(tiny_model, "float32", "cpu")
    work = step_work(model, [[5, 6, 7], [5, 6, 7]], [[8, 9], [10]])
    # a layer: q and o 32 x 32, k and v 32 x 16, three 32 x 64 of the feed-forward; two layers
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    # prompt once, of the completions one token but the last: 3 + 1 + 0; it sees 4, the prompt's 1-3
    tokens, pairs = 4, 1 + 2 + 3 + 4
    # scores and values: 2 products of 8 for each of 4 heads in 2 layers
    forward = (
        2 * weights * tokens + 2 * 32 * model.config.vocab_size * 3 + 2 * 2 * 8 * 4 * 2 * pairs
    )
    assert work.flops == 3 * forward
    assert (work.decoder_tokens, work.completion_tokens) == (4, 3)


def test_bench_gpu_runs_without_pydantic_on_the_cpu(tmp_path: Path) -> None:
    """No package beside torch, transformers, pyarrow and ours: the others are made to fail."""
    out, blocked = tmp_path / "gpu.json", ("pydantic", "datasets", "prefect", "dvc", "math_verify")
    options = "--models tiny --device cpu --dtype float32 --prompts 2 --group 4 --prompt 24 "
    options += f"--completion 6 --token-budget 90 --rounds 2 --out {out}"
    program = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        f"sys.argv = ['bench_gpu.py', *{options.split()!r}]\n"
        f"runpy.run_path({str(BENCHMARKS / 'bench_gpu.py')!r}, run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    [shape] = json.loads(out.read_text())["shapes"]
    for side in ("ours", "plain"):
        assert set(shape[side]["phases"]) == {"generation", "scoring", "update"}
        assert 0 < shape[side]["mfu"] < 1
        assert shape["peak_mb"][side] > 0
    assert "tokens/s, MFU" in run.stdout


def test_bench_gpu_says_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench_gpu.py"])
    from bench_gpu import main

    assert main() == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_the_summary_of_bench_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians, ratios and spread of phases written out."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import argparse

    from bench_step import report, summary

    def turn(generation: float, scoring: float, update: float) -> dict[str, Any]:
        return {
            "seconds": {"generation": generation, "scoring": scoring, "update": update},
            "peak_mb": 10 * generation,
            "dtype": "float32",
            "flops": 1e9,
            "decoder_tokens": 100,
            "threads": 1,
        }

    ours = [turn(1, 1, 2), turn(1, 1, 3), turn(2, 1, 2)]  # totals 4, 5, 5
    trl = [turn(10, 1, 19), turn(10, 1, 29), turn(10, 1, 39)]  # totals 30, 40, 50
    options = argparse.Namespace(clock="seconds")
    first = {"float32": 9.0, "bfloat16": 7.0}
    found = summary(options, (200, 32, 8), {"ours": ours, "trl": trl}, first)
    assert found["ratio_total"] == 8.0
    assert found["phases"]["update"]["ratio"] == 14.5
    assert found["phases"]["scoring+update"]["ours"] == 3.0
    assert found["spread"] == {"ours": 0.2, "trl": 0.5}
    assert found["trl_setting"] == "bfloat16"
    assert found["peak_mb"] == {"ours": 20, "trl": 100}
    share = 1e9 / 3.0 / found["roofline"]["product_rate"]
    assert found["roofline"]["share"] == pytest.approx(share)
    assert "total 8.0x (goal 8x)" in report(found)
