"""Checkpoints: what they hold, what damages them, and that a resumed run gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_train import annotated_rows, pipeline_params

from entrograd import io
from entrograd.params import Params
from entrograd.train import offline as offline_module
from entrograd.train import online as online_module

ALWAYS = {"max_share": 1.0}


class Killed(BaseException):
    """Ends a run as a kill does: no handler of the project catches it."""


def prompts_table(path: Path, count: int = 8) -> Path:
    io.write_table(
        path,
        [
            {
                "prompt_id": f"id{i}",
                "source": "s",
                "split": "train",
                "problem": f"{i}",
                "answers": list("0123456789"),
                "prompt_text": f"{i} = ",
            }
            for i in range(count)
        ],
        "prompts",
    )
    return path


def params(**checkpoint: Any) -> Params:
    block = {**ALWAYS, **checkpoint}
    return pipeline_params(
        method={"name": "gtpo"},
        rollout={"group_size": 4, "sampling": {"max_new_tokens": 2}},
        train_offline={"epochs": 4, "groups_per_step": 1, "checkpoint": block},
        train_online={
            "steps": 4,
            "prompts_per_step": 3,
            "updates_per_round": 2,
            "optimizer": {"lr": 0.01, "schedule": "linear", "warmup_steps": 2},
            "checkpoint": block,
        },
    )


def run_offline(params: Params, model: Path, folder: Path) -> dict[str, str]:
    """Train on the two groups of `annotated_rows`; the hashes of all outputs."""
    if not (folder / "rows.parquet").exists():
        io.write_table(folder / "rows.parquet", annotated_rows(), "annotated")
    offline_module.train_offline(
        params.train_offline,
        params.method,
        model,
        folder / "rows.parquet",
        folder / "out",
        folder / "curve.csv",
        folder / "resume",
    )
    return {name: io.sha256(folder / name) for name in ("out", "curve.csv")}


def run_online(params: Params, model: Path, folder: Path) -> dict[str, str]:
    if not (folder / "prompts.parquet").exists():
        prompts_table(folder / "prompts.parquet")
    online_module.train_online(
        params,
        model,
        folder / "prompts.parquet",
        folder / "out",
        folder / "rounds",
        folder / "curve.csv",
        folder / "resume",
    )
    return {name: io.sha256(folder / name) for name in ("out", "rounds", "curve.csv")}


RUNS: dict[str, Callable[[Params, Path, Path], dict[str, str]]] = {
    "offline": run_offline,
    "online": run_online,
}
MODULES = {"offline": offline_module, "online": online_module}


def stop_at(monkeypatch: pytest.MonkeyPatch, kind: str, update: int) -> list[int]:
    """Kill the run before its `update`-th update from now; counts the updates it makes."""
    real = MODULES[kind].train_step
    made: list[int] = []

    def counted(*args: Any) -> dict[str, float]:
        if len(made) == update:
            raise Killed
        made.append(1)
        return real(*args)

    monkeypatch.setattr(MODULES[kind], "train_step", counted)
    return made


@pytest.mark.parametrize("kind", RUNS)
def test_stopped_at_every_update_it_gives_the_same_bits(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole = RUNS[kind](params(), tiny_model, tmp_path / "whole")
    (tmp_path / "stopped").mkdir()
    for _ in range(7):  # one update more each time
        with monkeypatch.context() as patch:
            stop_at(patch, kind, 1)
            with pytest.raises(Killed):
                RUNS[kind](params(), tiny_model, tmp_path / "stopped")
        assert not (tmp_path / "stopped/out").exists()
    with monkeypatch.context() as patch:
        made = stop_at(patch, kind, 2)
        assert RUNS[kind](params(), tiny_model, tmp_path / "stopped") == whole
    assert len(made) == 1
