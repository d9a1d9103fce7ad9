"""Overlap: completions drawn ahead, by the policy before the updates that run meanwhile."""

from __future__ import annotations

import csv
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from entrograd.errors import InputError
from entrograd.models.load import load_model, load_tokenizer
from entrograd.rollout.transformers_engine import TransformersEngine
from entrograd.storage.tables import read_table, shard_files
from entrograd.train import online as online_module
from helpers.tables import write_prompts
from helpers.training import online_hashes, pipeline_params

STEPS = 5


class OwnEngine(TransformersEngine):
    """Weights of its own, as a vLLM server has; remembers each version of them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(load_model(folder, "float32", "cpu"), load_tokenizer(folder), 4096)
        self.weights: dict[str, Any] = {}
        self._remember()

    def update_weights(self, model: Any) -> None:
        super().update_weights(model)
        self._remember()

    def _remember(self) -> None:
        state = self.model.state_dict()
        self.weights[self.policy_version] = {name: w.clone() for name, w in state.items()}


@pytest.fixture
def engines(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> list[OwnEngine]:
    """The engines that runs have opened."""
    opened: list[OwnEngine] = []

    def open_engine(*_: Any) -> OwnEngine:
        opened.append(OwnEngine(tiny_model))
        return opened[-1]

    monkeypatch.setattr(online_module, "open_engine", open_engine)
    return opened


def overlapped(**online: Any) -> Any:
    return pipeline_params(
        rollout={"engine": "vllm_server", "group_size": 4, "sampling": {"max_new_tokens": 3}},
        train_online={
            "rounds": STEPS,
            "prompts_per_round": 3,
            "prefetch": True,
            "optimizer": {"lr": 0.01},
            "checkpoint": {"max_fraction": 1.0},
            **online,
        },
        method={"name": "grpo", "grpo": {"importance_sampling": "truncated"}},
    )


def run(params: Any, model: Path, folder: Path, name: str) -> list[str]:
    write_prompts(folder / "prompts.parquet", 8)
    return online_hashes(params, model, folder, name)


def plain_logprobs(model: Any, row: dict[str, Any]) -> list[float]:
    """Of the completion's tokens, by a forward of the whole text."""
    ids, start = torch.tensor([row["prompt_ids"] + row["completion_ids"]]), len(row["prompt_ids"])
    with torch.inference_mode():
        logprobs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
    taken = logprobs.gather(-1, ids[0, start:, None])[:, 0]
    return [float(value) for value in taken]


@pytest.mark.parametrize("updates", [1, 2])
def test_a_round_is_of_the_policy_before_the_last_updates_and_says_so(
    updates: int, engines: list[OwnEngine], tiny_model: Path, tmp_path: Path
) -> None:
    run(overlapped(epochs_per_round=updates), tiny_model, tmp_path, "a")
    (engine,) = engines
    versions = list(engine.weights)
    assert len(versions) == STEPS + 1
    rows = [
        read_table(shard, "annotated").to_pylist() for shard in shard_files(tmp_path / "rounds-a")
    ]
    sampled_by = [{row["policy_version"] for row in part} for part in rows]
    assert sampled_by == [{versions[max(0, number - 1)]} for number in range(STEPS)]
    # sampling_logprobs are that policy's, old_logprobs those of the policy about to be updated
    model = load_model(tiny_model, "float32", "cpu")
    for number, part in enumerate(rows):
        for column, version in (
            ("sampling_logprobs", versions[max(0, number - 1)]),
            ("old_logprobs", versions[number]),
        ):
            model.load_state_dict(engine.weights[version])
            for row in part:
                assert row[column] == pytest.approx(plain_logprobs(model, row), abs=2e-4), column
    with (tmp_path / "a.csv").open() as file:
        gaps = [float(row["mismatch_mean"]) for row in csv.DictReader(file)][::updates]
    assert gaps[0] < 1e-4 < min(gaps[1:])
    prompts = [row["prompt_id"] for part in rows for row in part[::4]]
    assert len(set(prompts[:8])) == 8  # in the order of a run without overlap


@pytest.mark.usefixtures("engines")
def test_it_draws_while_the_update_runs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each draw but the first waits for the update that it runs beside, which waits for its end."""
    real_step, real_generate = online_module.train_step, OwnEngine.generate
    updating, drawn, draws = threading.Event(), threading.Event(), [0]

    def generate(self: OwnEngine, *arguments: Any) -> Sequence[Any]:
        draws[0] += 1
        if draws[0] > 1:
            assert updating.wait(60)
        completions = real_generate(self, *arguments)
        updating.clear()
        drawn.set()
        return completions

    steps = [0]

    def train_step(*arguments: Any) -> Any:
        steps[0] += 1
        if steps[0] == 1:
            drawn.clear()  # round 0 was drawn before
        updating.set()
        if steps[0] < STEPS:
            assert drawn.wait(60)
        drawn.clear()
        return real_step(*arguments)

    monkeypatch.setattr(OwnEngine, "generate", generate)
    monkeypatch.setattr(online_module, "train_step", train_step)
    run(overlapped(), tiny_model, tmp_path, "a")
    assert (draws[0], steps[0]) == (STEPS, STEPS)


@pytest.mark.parametrize("updates", [1, 2])
def test_killed_and_run_again_gives_the_same_bytes(
    updates: int,
    engines: list[OwnEngine],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = overlapped(epochs_per_round=updates)
    want = run(params, tiny_model, tmp_path, "a")
    real_step, real_generate = online_module.train_step, OwnEngine.generate
    calls, draws = [0], [0]

    def step(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] in (1, 3, 5, 9):
            raise KeyboardInterrupt
        return real_step(*arguments)

    def generate(self: OwnEngine, *arguments: Any) -> Any:
        draws[0] += 1
        if draws[0] == 7:
            raise KeyboardInterrupt  # the engine's end shows where its completions are asked for
        return real_generate(self, *arguments)

    monkeypatch.setattr(online_module, "train_step", step)
    monkeypatch.setattr(OwnEngine, "generate", generate)
    interrupted = 0
    while True:
        try:
            found = run(params, tiny_model, tmp_path, "b")
            break
        except KeyboardInterrupt:
            interrupted += 1
    assert found == want
    assert interrupted >= 4
    assert [len(engine.weights) > 1 for engine in engines].count(True) > 2


def test_what_the_policy_that_is_gone_drew_is_asked_for_by_name(
    engines: list[OwnEngine], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = online_module.train_step, [0]

    def step(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(online_module, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        run(overlapped(), tiny_model, tmp_path, "a")
    (tmp_path / "work-a" / "ahead-00002.parquet").write_bytes(b"cut off")
    with pytest.raises(InputError, match="the completions of round 3 are lost"):
        run(overlapped(), tiny_model, tmp_path, "a")
    assert len(engines) == 2


@pytest.mark.parametrize(
    ("rollout", "online", "method", "message"),
    [
        (
            {"engine": "transformers"},
            {},
            {"importance_sampling": "masked"},
            "the very weights that are",
        ),
        (
            {"engine": "vllm"},
            {"dynamic_sampling": {}},
            {"importance_sampling": "masked"},
            "depends on gra",
        ),
        ({"engine": "vllm"}, {}, {}, r"biases every update; set method\.grpo\.importance_sampling"),
    ],
)
def test_refused_where_it_cannot_be(rollout: Any, online: Any, method: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"train_online\.prefetch: .*{message}"):
        pipeline_params(
            rollout=rollout,
            train_online={"prefetch": True, **online},
            method={"name": "grpo", "grpo": method},
        )
