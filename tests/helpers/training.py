"""Both training stages on small files, whole or killed before an update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from entrograd.params import check
from entrograd.pipeline.rules import check_rules
from entrograd.pipeline.sections import Params
from entrograd.storage.hashing import sha256
from entrograd.storage.tables import write_table
from entrograd.train import offline as offline_module
from entrograd.train import online as online_module
from entrograd.train.online import train_online
from entrograd.train.params import TrainOfflineParams
from entrograd.train.policy import Policy
from helpers.paths import SHIPPED
from helpers.tables import annotated_rows, write_prompts


def pipeline_params(**sections: Any) -> Params:
    """The project's own params.yaml in float32, with blocks of some sections replaced."""
    data = yaml.safe_load(SHIPPED.read_text())
    del data["execution"]
    for name in ("rollout", "annotate", "train_offline", "train_online", "evaluate"):
        data[name]["dtype"] = "float32"
    for name, block in sections.items():
        data[name] = block if name == "method" else {**data[name], **block}
    params = check(Params, data, "")
    check_rules(params)
    return params


def policy(path: Path, dtype: str = "float32", **options: Any) -> Policy:
    params = TrainOfflineParams.model_validate(
        {"dtype": dtype, "device": "cpu", "optimizer": options}
    )
    return Policy.load(path, params, updates=10)


def online_hashes(params: Any, model: Path, folder: Path, name: str) -> list[str]:
    """Train online on `folder`/prompts.parquet, resuming what a run of this name left; the hashes
    of weights, rounds and curve."""
    (folder / f"work-{name}").mkdir(exist_ok=True)
    train_online(
        params,
        model,
        folder / "prompts.parquet",
        folder / name,
        folder / f"rounds-{name}",
        folder / f"{name}.csv",
        folder / f"work-{name}",
    )
    return [sha256(folder / part) for part in (name, f"rounds-{name}", f"{name}.csv")]


ALWAYS = {"max_fraction": 1.0}


class Killed(BaseException):
    """Ends a run as a kill does: no handler of the project catches it."""


def params(online: dict[str, Any] | None = None, **checkpoint: Any) -> Params:
    block = {**ALWAYS, **checkpoint}
    return pipeline_params(
        method={"name": "gtpo"},
        rollout={"group_size": 4, "sampling": {"max_new_tokens": 2}},
        train_offline={"epochs": 4, "prompts_per_update": 1, "checkpoint": block},
        train_online={
            "rounds": 4,
            "prompts_per_round": 3,
            "epochs_per_round": 2,
            "optimizer": {"lr": 0.01, "schedule": "linear", "warmup_updates": 2},
            "checkpoint": block,
            **(online or {}),
        },
    )


def run_offline(params: Params, model: Path, folder: Path) -> dict[str, str]:
    """Train on the two groups of `annotated_rows`; the hashes of all outputs."""
    if not (folder / "rows.parquet").exists():
        rows = annotated_rows()
        rows[4]["reward"] = 1.0  # both groups have a signal
        write_table(folder / "rows.parquet", rows, "annotated")
    offline_module.train_offline(
        params.train_offline,
        params.method,
        model,
        folder / "rows.parquet",
        folder / "out",
        folder / "curve.csv",
        folder / "resume",
    )
    return {name: sha256(folder / name) for name in ("out", "curve.csv")}


def run_online(params: Params, model: Path, folder: Path) -> dict[str, str]:
    if not (folder / "prompts.parquet").exists():
        write_prompts(folder / "prompts.parquet", 8)
    online_module.train_online(
        params,
        model,
        folder / "prompts.parquet",
        folder / "out",
        folder / "rounds",
        folder / "curve.csv",
        folder / "resume",
    )
    return {name: sha256(folder / name) for name in ("out", "rounds", "curve.csv")}


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
