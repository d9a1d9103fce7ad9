"""Checkpoints: what they hold, what damages them, and that a resumed run gives the same bits."""

from __future__ import annotations

import csv
import errno
import json
import os
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entrograd.errors import InputError, NonFiniteError
from entrograd.methods.recipe import Recipe
from entrograd.models.load import load_model, policy_version
from entrograd.pipeline import fingerprint
from entrograd.storage.files import write_json
from entrograd.storage.hashing import sha256
from entrograd.storage.metrics import CURVE
from entrograd.storage.tables import read_table, shard_name, write_table
from entrograd.train import checkpoint as checkpoint_module
from entrograd.train import forward_backward as forward_backward_module
from entrograd.train import offline as offline_module
from entrograd.train import online as online_module
from entrograd.train.checkpoint import (
    CheckpointError,
    Checkpoints,
    DamagedError,
    State,
    random_state,
    set_random_state,
)
from entrograd.train.optimizer import Optimizer
from entrograd.train.params import Checkpoint
from entrograd.train.rounds import Position, PromptOrder, Round, Rounds
from helpers.tables import annotated_rows, groups, write_prompts
from helpers.training import (
    ALWAYS,
    RUNS,
    Killed,
    params,
    pipeline_params,
    policy,
    run_offline,
    run_online,
    stop_at,
)


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


def test_with_mini_batches_it_resumes_to_the_same_bits_at_every_update(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds of three groups, two passes, two groups per update: eight updates."""
    chosen = params({"rounds": 2, "prompts_per_update": 2})
    (tmp_path / "whole").mkdir()
    sizes: list[list[str]] = []
    real = online_module.train_step

    def noted(policy: Any, recipe: Any, built: Any, *rest: Any) -> dict[str, float]:
        sizes.append(list(dict.fromkeys(built.batch.names)))
        return real(policy, recipe, built, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(online_module, "train_step", noted)
        whole = run_online(chosen, tiny_model, tmp_path / "whole")
    assert [len(names) for names in sizes] == [2, 1] * 4
    for start in (0, 4):  # each pass has the round's prompts, each once, the first in their order
        first, second = ([*sizes[i], *sizes[i + 1]] for i in (start, start + 2))
        assert sorted(first) == sorted(second)
        table = read_table(tmp_path / "whole/rounds" / shard_name(start // 4), "annotated")
        assert first == list(dict.fromkeys(table["prompt_id"].to_pylist()))
    (tmp_path / "stopped").mkdir()
    for _ in range(7):
        with monkeypatch.context() as patch:
            stop_at(patch, "online", 1)
            with pytest.raises(Killed):
                run_online(chosen, tiny_model, tmp_path / "stopped")
    assert run_online(chosen, tiny_model, tmp_path / "stopped") == whole


def test_held_out_accuracy_changes_no_weights_and_resumes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured in rounds 1, 3 and 4 of four; the best of them is kept."""
    measured = {"evaluate": {"every_rounds": 2, "problems": 3}}
    found = {}
    for name, online, best in (
        ("plain", {}, {}),
        ("with", measured, {"keep_best": "heldout_accuracy"}),
        ("stopped", measured, {"keep_best": "heldout_accuracy"}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        write_prompts(folder / "prompts.parquet", 8)
        rows = read_table(folder / "prompts.parquet", "prompts").to_pylist()
        held = [{**row, "prompt_id": f"h{i}", "split": "heldout"} for i, row in enumerate(rows)]
        write_table(folder / "prompts.parquet", [*rows, *held], "prompts")
        chosen = params(online, **best)
        for update in (2, 3) if name == "stopped" else ():
            with monkeypatch.context() as patch:
                stop_at(patch, "online", update)
                with pytest.raises(Killed):
                    run_online(chosen, tiny_model, folder)
        found[name] = run_online(chosen, tiny_model, folder)
    assert found["stopped"] == found["with"]
    assert sha256(tmp_path / "plain/out/model.safetensors") == sha256(
        tmp_path / "with/out/model.safetensors"
    )
    assert found["plain"]["rounds"] == found["with"]["rounds"]
    with (tmp_path / "with/curve.csv").open() as file:
        values = [row["heldout_accuracy"] for row in csv.DictReader(file)]
    first, second = values[::2], values[1::2]  # two updates per round, measured before the first
    assert [bool(value) for value in first] == [True, False, True, True]
    assert second == [""] * 4
    assert all(0 <= float(value) <= 1 for value in values if value)
    assert (tmp_path / "with/out/best/config.json").exists()


def trained(model: Path, folder: Path, **checkpoint: Any) -> tuple[Checkpoints, State]:
    """Three checkpoints of a policy that was updated by hand."""
    subject = policy(model, lr=0.01)
    values = [0.5, 0.9, 0.1]
    checkpoints = Checkpoints(folder, Checkpoint(**{**ALWAYS, **checkpoint}), subject.optimizer)
    state = checkpoints.restore()
    while subject.optimizer.done < 3:
        for master in subject.optimizer.masters.values():
            master.grad = torch.full_like(master, 0.1 * (subject.optimizer.done + 1))
        subject.optimizer.step(subject.optimizer.gradient_norm())
        state.curve.append({"step": subject.optimizer.done, "value": values[len(state.curve)]})
        state.data = {"position": subject.optimizer.done}
        checkpoints.save_if_due(state)
    return checkpoints, state


def names(checkpoints: Checkpoints) -> list[int]:
    return [int(path.name.removeprefix("update-")) for path in checkpoints.saved()]


def test_a_checkpoint_holds_everything(tiny_model: Path, tmp_path: Path) -> None:
    before, state = trained(tiny_model, tmp_path)
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    before.save(state)
    drawn = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    subject = policy(tiny_model, lr=0.01)
    after = Checkpoints(tmp_path, Checkpoint(), subject.optimizer)
    found = after.restore()
    assert found == state
    assert subject.optimizer.done == 3
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == drawn
    for name, master in before.optimizer.masters.items():
        assert torch.equal(subject.optimizer.masters[name], master)
        assert torch.equal(subject.optimizer.weights[name], before.optimizer.weights[name])
        ours, theirs = (
            o.adamw.state[o.masters[name]] for o in (subject.optimizer, before.optimizer)
        )
        assert set(ours) == set(theirs) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_bfloat16_weights_follow_their_masters(tiny_model: Path, tmp_path: Path) -> None:
    before, state = trained(tiny_model, tmp_path)
    before.save(state)
    subject = policy(tiny_model, "bfloat16")
    Checkpoints(tmp_path, Checkpoint(), subject.optimizer).restore()
    for name, weight in subject.model.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, before.optimizer.masters[name].bfloat16())


def test_random_states_of_a_checkpoint_are_json() -> None:
    state = json.loads(json.dumps(random_state()))
    first = torch.rand(5), np.random.rand(5), random.random()
    set_random_state(state)
    second = torch.rand(5), np.random.rand(5), random.random()
    assert torch.equal(first[0], second[0])
    assert first[1].tolist() == second[1].tolist()
    assert first[2] == second[2]


def test_keeps_the_last_and_the_best(tiny_model: Path, tmp_path: Path) -> None:
    """Row 2 of the curve (value 0.9) measured the weights after update 1, row 3 (0.1) those
    after update 2; nothing has measured update 3's yet."""
    assert names(trained(tiny_model, tmp_path / "last", keep_last=1)[0]) == [3]
    best = trained(tiny_model, tmp_path / "best", keep_last=1, keep_best="value")[0]
    assert names(best) == [1, 3]
    lowest = trained(tiny_model, tmp_path / "lowest", keep_last=1, keep_best="-value")[0]
    assert names(lowest) == [2, 3]
    with pytest.raises(InputError, match=r"keep_best: the curve has no wrong; it has step, value"):
        trained(tiny_model, tmp_path / "wrong", keep_best="wrong")


def test_the_best_weights_come_out(tiny_model: Path, tmp_path: Path) -> None:
    run_offline(params(keep_best="-loss"), tiny_model, tmp_path)
    with (tmp_path / "curve.csv").open() as file:
        curve = list(csv.DictReader(file))
    assert set(curve[0]) <= set(CURVE)
    losses = [float(row["loss"]) for row in curve]
    best = min(range(1, len(losses)), key=lambda step: losses[step])
    assert (tmp_path / "out/best/config.json").exists()
    found = policy_version(load_model(tmp_path / "out/best", "float32", "cpu"))
    assert found != policy_version(load_model(tmp_path / "out", "float32", "cpu"))
    (tmp_path / "short").mkdir()
    short = pipeline_params(
        method={"name": "gtpo"}, train_offline={"epochs": 4, "prompts_per_update": 1}
    )
    with pytest.MonkeyPatch.context() as patch:  # the same run, ended after `best` updates
        whole = offline_module.schedule
        patch.setattr(offline_module, "schedule", lambda *given: whole(*given)[:best])
        run_offline(short, tiny_model, tmp_path / "short")
    assert found == policy_version(load_model(tmp_path / "short/out", "float32", "cpu"))


def test_writing_is_put_off_while_it_costs_too_much(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = policy(tiny_model)
    checkpoints = Checkpoints(tmp_path, Checkpoint(max_fraction=0.1), subject.optimizer)
    now = [0.0]
    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(checkpoints, "save", lambda _: now.__setitem__(0, now[0] + 2.0))
    checkpoints._start = 0.0
    checkpoints._cost = 1.0
    saved = []
    for _ in range(60):
        now[0] += 1.0
        before = now[0]
        checkpoints.save_if_due(State())
        if now[0] > before:
            saved.append(before)
    # 1 s was expected: at 10 s; then 2 s each: 2 + 2 <= 0.1 t at 40 s, 4 + 2 <= 0.1 t at 60 s
    assert saved == [10.0, 40.0, 60.0]


@pytest.mark.parametrize("what", ["weights", "exp_avg", "state", "manifest"])
@pytest.mark.parametrize("how", ["cut", "changed", "absent"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_continued(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str, how: str
) -> None:
    before, _ = trained(tiny_model, tmp_path)
    file = next((tmp_path / "checkpoints/update-00000003").glob(f"{what}.*"))
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "changed":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        file.unlink()
    subject = policy(tiny_model)
    after = Checkpoints(tmp_path, Checkpoint(), subject.optimizer)
    kept = {name: weight.clone() for name, weight in subject.optimizer.masters.items()}
    with pytest.raises(
        DamagedError, match=rf"update-00000003.*{'manifest' if what == 'manifest' else what}"
    ):
        after.load(tmp_path / "checkpoints/update-00000003")
    assert all(torch.equal(kept[n], w) for n, w in subject.optimizer.masters.items())
    state = after.restore()
    assert subject.optimizer.done == 2
    assert state.data == {"position": 2}
    assert "a damaged checkpoint" in caplog.text
    assert before.optimizer.done == 3


def test_a_checkpoint_of_another_run_is_refused_with_what_changed(
    tiny_model: Path, tmp_path: Path
) -> None:
    def fingerprint_of(lr: float, digest: str) -> fingerprint.Fingerprint:
        given = {"train_offline": {"optimizer": {"lr": lr}, "seed": 1}}
        return fingerprint.fingerprint("train_offline", given, {"data/annotated": digest}, {}, {})

    write_json(tmp_path / fingerprint.FILE, fingerprint_of(0.1, "a"))
    trained(tiny_model, tmp_path)
    write_json(tmp_path / fingerprint.FILE, fingerprint_of(0.2, "b"))
    subject = policy(tiny_model)
    with pytest.raises(CheckpointError) as refused:
        Checkpoints(tmp_path, Checkpoint(), subject.optimizer).restore()
    assert "train_offline.optimizer.lr 0.1 -> 0.2" in str(refused.value)
    assert "the content of data/annotated" in str(refused.value)
    assert "seed" not in str(refused.value)
    assert subject.optimizer.done == 0


@pytest.mark.parametrize("limit", [10, 3000, 60_000])
def test_a_full_disk_is_named_and_the_checkpoint_before_it_loads(
    tiny_model: Path, tmp_path: Path, limit: int
) -> None:
    """The file-size limit ends a write as a full disk does, at another byte each time."""
    before, state = trained(tiny_model, tmp_path)
    before.optimizer.done = 4
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(
            InputError, match=r"update-00000004.*cannot be written.*update-00000003 is whole"
        ):
            before.save(state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not list((tmp_path / "checkpoints").glob(".update-*"))
    subject = policy(tiny_model)
    Checkpoints(tmp_path, Checkpoint(), subject.optimizer).restore()
    assert subject.optimizer.done == 3


@pytest.mark.parametrize("call", range(8))
def test_no_space_at_any_file_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    before, state = trained(tiny_model, tmp_path)
    before.optimizer.done = 4
    real = os.fsync
    calls: list[int] = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        before.save(state)
    monkeypatch.undo()
    subject = policy(tiny_model)
    Checkpoints(tmp_path, Checkpoint(), subject.optimizer).restore()
    assert subject.optimizer.done in (3, 4)


def test_prompt_order_continues_anywhere() -> None:
    whole = PromptOrder(7, 3, seed=1)
    following = [next(whole) for _ in range(20)]
    for done in range(20):
        first = PromptOrder(7, 3, seed=1)
        for _ in range(done):
            next(first)
        second = PromptOrder(7, 3, seed=1)
        second.restore(json.loads(json.dumps(first.position())))
        assert [next(second) for _ in range(20 - done)] == following[done:]


def test_the_position_in_the_prompt_order_does_not_grow() -> None:
    """Oracle: the order as a list of all prompts that wait."""
    order, waiting = PromptOrder(50, 7, seed=3), list[int]()
    generator = np.random.Generator(np.random.Philox(key=3))
    for number in range(60):
        carried = {(5 * number + i) % 50 for i in range(number % 4)}
        used, want = set(carried), list[int]()
        while len(want) < 7:
            if used.issuperset(waiting):
                waiting = [*waiting, *generator.permutation(50).tolist()]
            following = next(i for i in waiting if i not in used)
            waiting.remove(following)
            used.add(following)
            want.append(following)
        assert order.take(7, set(carried)) == want
        assert len(json.dumps(order.position())) < 120
    assert order.position().keys() == {"permutations", "offset", "skipped"}


class TestRounds:
    def test_a_round_that_another_policy_sampled_is_drawn_again(self, tmp_path: Path) -> None:
        rounds = Rounds(tmp_path, {})
        order: Position = {"permutations": 1, "offset": 3, "skipped": [2]}
        drawn = Round(groups(annotated_rows()), {"reward_mean": 0.1}, order)
        rounds.write(3, drawn)
        stored = rounds.read(3, "v")
        assert stored
        assert (stored.measured, stored.order) == (drawn.measured, drawn.order)
        assert rounds.read(3, "w") is None
        assert rounds.read(4, "v") is None

    def test_a_cut_round_is_drawn_again_unless_updates_were_made_on_it(
        self, tmp_path: Path
    ) -> None:
        rounds = Rounds(tmp_path, {})
        order = PromptOrder(6, 2, 0).position()
        rounds.write(0, Round(groups(annotated_rows()), {}, order))
        file = tmp_path / shard_name(0)
        file.write_bytes(file.read_bytes()[:-20])
        assert rounds.read(0, "v") is None
        with pytest.raises(InputError, match=r"shard-00000.parquet: lost, and updates were made"):
            rounds.read(0, None)


class TestNonFinite:
    @pytest.mark.parametrize("where", ["logprob", "loss", "gradient"])
    def test_stops_before_the_update_and_keeps_the_batch(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
    ) -> None:
        """The second of the run's updates meets a value that is no number."""
        real = forward_backward_module.completion_logprobs
        calls: list[int] = []

        def broken(*given: Any) -> Any:
            logprobs, entropies = real(*given)
            calls.append(1)
            if len(calls) == 2 and where == "logprob":
                logprobs = logprobs.clone()
                logprobs[-1] = float("nan")
            if len(calls) == 2 and where == "gradient":
                logprobs.register_hook(lambda gradient: gradient * float("inf"))
            return logprobs, entropies

        stepped: list[float] = []

        def counted(optimizer: Optimizer, norm: float) -> None:
            stepped.append(norm)
            optimizer.done += 1

        aggregate = Recipe.aggregate
        monkeypatch.setattr(
            Recipe,
            "aggregate",
            lambda *given: (
                aggregate(*given) / torch.tensor(float(len(calls) != 2 or where != "loss"))
            ),
        )
        monkeypatch.setattr(forward_backward_module, "completion_logprobs", broken)
        monkeypatch.setattr(Optimizer, "step", counted)
        rows = [{**row, "reward": float(row["sample_index"] == 1)} for row in annotated_rows()]
        write_table(tmp_path / "rows.parquet", rows, "annotated")
        chosen = offline_module.schedule(2, params().train_offline)[1][1]
        with pytest.raises(NonFiniteError) as stopped:
            run_offline(params(), tiny_model, tmp_path)
        assert len(stepped) == 1
        file = tmp_path / "resume/nonfinite.parquet"
        assert str(file) in str(stopped.value)
        assert f"p{chosen[0]}" in str(stopped.value)
        assert f"p{1 - chosen[0]}" not in str(stopped.value)
        kept = read_table(file, "annotated").to_pylist()
        assert {row["prompt_id"] for row in kept} == {f"p{chosen[0]}"}
        assert [row["completion_ids"] for row in kept] == [
            row["completion_ids"] for row in rows if row["prompt_id"] == f"p{chosen[0]}"
        ]
        assert not (tmp_path / "out").exists()
