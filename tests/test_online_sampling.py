"""What online training asks of its sampling: the mismatch gate, dynamic sampling, filters."""

from __future__ import annotations

import csv
import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrograd.data.groups import PromptGroup
from entrograd.errors import InputError
from entrograd.methods.batch import Batch
from entrograd.methods.params import MethodParams
from entrograd.methods.registry import recipe
from entrograd.storage.metrics import CURVE
from entrograd.storage.tables import read_table, shard_files, write_table
from entrograd.train import online as online_module
from entrograd.train.dynamic import Filled, fill, has_signal
from entrograd.train.mismatch import gate, measure
from entrograd.train.params import DynamicSampling, MismatchGate
from entrograd.train.rounds import PromptOrder
from helpers.tables import annotated_rows, groups, write_prompts
from helpers.training import online_hashes, pipeline_params


def gap_batch(old: list[list[float]], sampling: list[list[float]], lengths: list[int]) -> Batch:
    mask = torch.arange(len(old[0])) < torch.tensor(lengths)[:, None]
    return Batch(
        completion_mask=mask,
        groups=torch.zeros(len(old), dtype=torch.long),
        rewards=torch.arange(len(old)).float(),
        old_logprobs=torch.tensor(old),
        sampling_logprobs=torch.tensor(sampling),
    )


class TestGap:
    # trainer - engine: +.1, -.3 | +.2; the padded place differs by 9 and must not count
    batch = gap_batch([[-1.0, -2.3], [-0.5, -9.0]], [[-1.1, -2.0], [-0.7, 0.0]], [2, 1])

    def test_by_hand(self) -> None:
        got = measure(self.batch)
        assert got["mismatch_mean"] == pytest.approx((0.1 + 0.3 + 0.2) / 3, abs=1e-6)
        assert got["mismatch_max"] == pytest.approx(0.3, abs=1e-6)
        terms = [math.exp(d) - d - 1 for d in (0.1, -0.3, 0.2)]
        assert got["mismatch_kl"] == pytest.approx(math.fsum(terms) / 3, abs=1e-6)

    def test_no_engine_logprobs_no_gap(self) -> None:
        assert measure(replace(self.batch, sampling_logprobs=None)) == {}

    def test_within_the_bounds_nothing_changes(self) -> None:
        chosen = recipe(MethodParams(name="gtpo"))
        bounds = MismatchGate(max_mean=0.21, max_abs=0.31, max_kl=0.05, action="stop")
        assert gate(measure(self.batch), bounds, chosen, "round 1") is chosen

    @pytest.mark.parametrize(
        ("bounds", "word"),
        [
            ({"max_mean": 0.19, "max_kl": None}, "mismatch_mean 0.2 above 0.19"),
            ({"max_mean": None, "max_abs": 0.29, "max_kl": None}, "mismatch_max 0.3 above 0.29"),
            ({"max_mean": None, "max_kl": 0.01}, "mismatch_kl 0.0"),
        ],
    )
    def test_above_one_it_stops_or_warns(
        self, bounds: dict[str, Any], word: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        chosen, mismatch = recipe(MethodParams(name="gtpo")), measure(self.batch)
        with pytest.raises(InputError, match=f"round 3: .*{word}"):
            gate(mismatch, MismatchGate(**bounds, action="stop"), chosen, "round 3")
        with caplog.at_level(logging.WARNING, "entrograd"):
            assert gate(mismatch, MismatchGate(**bounds), chosen, "round 3") is chosen
        assert word in caplog.text

    def test_not_a_number_is_above_every_bound(self) -> None:
        mismatch = {"mismatch_mean": float("nan"), "mismatch_max": 0.0, "mismatch_kl": 0.0}
        with pytest.raises(InputError, match="mismatch_mean nan above"):
            gate(
                mismatch, MismatchGate(action="stop"), recipe(MethodParams(name="grpo")), "round 1"
            )

    @pytest.mark.parametrize("kind", ["truncated", "masked"])
    def test_corrects_the_loss_by_hand(self, kind: str) -> None:
        """w = exp(old - sampling), at most the cap (truncated) or 0 above it (masked)."""
        chosen = recipe(MethodParams(name="grpo"))
        bounds = MismatchGate.model_validate(
            {"action": "correct", "importance_sampling": kind, "importance_sampling_cap": 1.15}
        )
        corrected = gate(measure(self.batch), bounds, chosen, "round 1")
        advantages = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
        logprobs = self.batch.old_logprobs.clone()
        plain = chosen.policy_loss(logprobs, advantages, self.batch)
        weighted = corrected.policy_loss(logprobs, advantages, self.batch)
        above = 1.15 if kind == "truncated" else 0.0
        want = [math.exp(0.1), math.exp(-0.3), above]  # exp(.2) = 1.22 is above the cap
        got = (weighted / plain)[self.batch.completion_mask].tolist()
        assert got == pytest.approx(want, abs=1e-5)

    def test_a_method_that_corrects_itself_keeps_its_own(self) -> None:
        section = MethodParams.model_validate(
            {
                "name": "grpo",
                "grpo": {"importance_sampling": "masked", "importance_sampling_cap": 3.0},
            }
        )
        chosen = recipe(section)
        assert gate(measure(self.batch), MismatchGate(action="correct"), chosen, "s") is chosen


class TestFilters:
    @pytest.mark.parametrize(
        "key", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"min_new_tokens": 2}]
    )
    def test_refused_without_a_correction_and_why(self, key: dict[str, Any]) -> None:
        rollout = {"sampling": {"max_new_tokens": 4, **key}}
        with pytest.raises(InputError, match=rf"sampling\.{next(iter(key))}.*biases every update"):
            pipeline_params(rollout=rollout, method={"name": "grpo"})
        corrected = {"name": "grpo", "grpo": {"importance_sampling": "truncated"}}
        assert pipeline_params(rollout=rollout, method=corrected).method.name == "grpo"

    def test_it_is_the_loss_that_corrects(self) -> None:
        rollout = {"sampling": {"max_new_tokens": 4, "top_p": 0.9}}
        method = {"name": "gtpo", "loss": "dr_grpo", "dapo": {"importance_sampling": "truncated"}}
        with pytest.raises(InputError, match=r"method\.dr_grpo\.importance_sampling"):
            pipeline_params(rollout=rollout, method=method)


def numbered(signals: list[bool]) -> Any:
    """A source of groups numbered from 0, with the signal listed for each; ends with the list."""
    place = [0]

    def draw(count: int) -> list[PromptGroup]:
        first, place[0] = place[0], min(place[0] + count, len(signals))
        return [group(i) for i in range(first, place[0])]

    return draw, lambda groups: [signals[i] for i in ids(groups)], place


def group(number: int) -> PromptGroup:
    return PromptGroup(str(number), np.array([1]), [])


def ids(groups: list[PromptGroup]) -> list[int]:
    return [int(group.prompt_id) for group in groups]


class TestFill:
    def test_by_hand(self) -> None:
        # 4 wanted, share 1: draws 4 (0 and 2 have signal), share (1 + .5)/2 = .75: ceil(2/.75) = 3
        # more (4, 5, 6 all have): 5 found, one of them left over; share (.75 + 1)/2
        signals = [True, False, True, False, True, True, True, True]
        draw, signal, place = numbered(signals)
        got = fill(4, [], 1.0, draw, signal, DynamicSampling())
        assert ids(got.groups) == [0, 2, 4, 5]
        assert ids(got.surplus) == [6]
        assert got.signal_fraction == pytest.approx(0.875)
        assert place[0] == 7
        # the round after starts with what was left and draws ceil(3 / .875) = 4
        draw, signal, _ = numbered([True] * 8)
        again = fill(4, got.surplus, got.signal_fraction, draw, signal, DynamicSampling())
        assert ids(again.groups) == [6, 0, 1, 2]
        assert ids(again.surplus) == [3]
        assert again.measured["groups_carried"] == 1.0

    def test_is_bounded(self, caplog: pytest.LogCaptureFixture) -> None:
        draw, signal, place = numbered([False] * 100)
        with caplog.at_level(logging.WARNING, "entrograd"):
            got = fill(3, [], 1.0, draw, signal, DynamicSampling(max_factor=4.0))
        assert place[0] == 12
        assert ids(got.groups) == [0, 1, 2]  # a batch without signal: its update changes nothing
        assert got.surplus == []
        assert "0 of 3 groups with signal after 12 prompts" in caplog.text

    def test_ends_where_no_prompt_is_left(self) -> None:
        draw, signal, _ = numbered([True, False, True])
        got = fill(5, [], 1.0, draw, signal, DynamicSampling())
        assert ids(got.groups) == [0, 2]

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(
        st.lists(st.booleans(), max_size=80),
        st.integers(1, 8),
        st.integers(0, 8),
        st.floats(0.01, 1),
        st.floats(1, 6),
        st.floats(0.05, 1),
    )
    def test_nothing_lost_nothing_twice(
        self, signals: list[bool], wanted: int, left: int, share: float, factor: float, new: float
    ) -> None:
        draw, signal, place = numbered(signals)
        carried = [group(-1 - i) for i in range(min(left, wanted))]
        limits = DynamicSampling(max_factor=factor, newest=new)
        got: Filled = fill(wanted, carried, share, draw, signal, limits)
        assert place[0] <= factor * wanted
        assert 0 < got.signal_fraction <= 1
        assert len(got.groups) <= wanted
        found = [*ids(carried), *(i for i in range(place[0]) if signals[i])]
        if found:
            assert ids(got.groups) == found[:wanted]
            assert ids(got.surplus) == found[wanted : 2 * wanted]
        if len(found) < wanted:  # only where the bound or the prompts ended it
            assert place[0] in (len(signals), math.floor(factor * wanted))


class TestPromptOrderTake:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.integers(1, 9), st.lists(st.integers(1, 12), max_size=12), st.integers(0, 3))
    def test_never_twice_in_a_round_and_evenly_over_rounds(
        self, prompts: int, counts: list[int], seed: int
    ) -> None:
        order, times = PromptOrder(prompts, 3, seed), [0] * prompts
        for count in counts:
            position = order.position()
            used: set[int] = set()
            chosen = order.take(count, used)
            assert len(set(chosen)) == len(chosen) == min(count, prompts)
            again = PromptOrder(prompts, 3, seed)
            again.restore(position)
            assert again.take(count, set()) == chosen
            for index in chosen:
                times[index] += 1
            assert max(times) - min(times) <= 2


def test_signal_is_what_the_method_makes_of_a_group() -> None:
    rows = annotated_rows()
    both = groups([{**row, "reward": 1.0} if row["prompt_id"] == "p1" else row for row in rows])
    for name in ("grpo", "gtpo", "dapo"):
        got = has_signal(recipe(MethodParams(name=name)), both, torch.device("cpu"))
        assert got == [len({c.reward for c in both[0].completions}) > 1, False]


class TestOnlineDynamic:
    def test_batches_hold_signal_and_a_killed_run_resumes_to_the_same_bits(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_prompts(tmp_path / "prompts.parquet", 24)
        params = pipeline_params(
            rollout={"group_size": 6, "sampling": {"max_new_tokens": 1}},
            train_online={
                "rounds": 6,
                "prompts_per_round": 3,
                "dynamic_sampling": {"max_factor": 8.0},
                "optimizer": {"lr": 1e-3},
                "checkpoint": {"max_fraction": 1.0},
            },
            method={"name": "grpo"},
        )
        whole = online_hashes(params, tiny_model, tmp_path, "a")
        with (tmp_path / "a.csv").open() as file:
            curve = list(csv.DictReader(file))
        assert set(curve[0]) <= set(CURVE)
        assert all((row["reward_mean"] == "") == (row["draws"] == "0.0") for row in curve)
        assert any(row["reward_mean"] != row["batch_reward_mean"] for row in curve)
        assert sum(float(row["groups_carried"]) for row in curve) > 0
        assert any(float(row["groups_drawn"]) > 3 for row in curve)
        assert all(float(row["mismatch_mean"]) < 1e-4 for row in curve)
        for shard in shard_files(tmp_path / "rounds-a"):
            groups: dict[str, set[float]] = {}
            for row in read_table(shard, "annotated").to_pylist():
                groups.setdefault(row["prompt_id"], set()).add(row["reward"])
            assert len(groups) == 3
            assert all(len(rewards) == 2 for rewards in groups.values())
        real, calls = online_module.train_step, [0]

        def killed(*arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] in (3, 5):
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(online_module, "train_step", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                online_hashes(params, tiny_model, tmp_path, "b")
        assert online_hashes(params, tiny_model, tmp_path, "b") == whole


class TestAlarms:
    """Each round is watched as stage annotate watches its table."""

    def run(self, model: Path, folder: Path, alarms: dict[str, float]) -> list[dict[str, str]]:
        """The curve of two steps on problems that nobody solves."""
        row = {"source": "s", "split": "train", "answers": ["never"], "prompt_text": "= "}
        rows = [{**row, "prompt_id": f"id{i}", "problem": f"{i}"} for i in range(2)]
        write_table(folder / "prompts.parquet", rows, "prompts")
        settings = pipeline_params(
            rollout={"group_size": 2, "sampling": {"max_new_tokens": 2}},
            annotate={"alarms": alarms},
            train_online={"rounds": 2, "prompts_per_round": 2},
            method={"name": "grpo"},
        )
        online_hashes(settings, model, folder, "a")
        with (folder / "a.csv").open() as file:
            return list(csv.DictReader(file))

    def test_each_round_warns_and_the_curve_counts(
        self, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, "entrograd"):
            curve = self.run(tiny_model, tmp_path, {"entropy_warn": 100.0, "truncated_warn": 1.0})
        for step in (1, 2):
            said = [text for text in caplog.messages if text.startswith(f"round {step}: ")]
            assert any("100.0% of groups have equal rewards (mean 0.000)" in text for text in said)
            assert any("the mean token entropy is" in text for text in said)
            assert float(curve[step - 1]["alarms"]) == len(said) >= 2
            shares = [float(curve[step - 1][f"{s}_fraction"]) for s in ("no_answer", "truncated")]
            assert 0 < sum(shares) <= 1
        assert any(re.search(r"loss 0.0000, alarms [2-4]$", text) for text in caplog.messages)

    def test_a_round_past_a_limit_stops_before_its_update(
        self, tiny_model: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=r"round 1: 100.0% of groups .*alarms.no_signal_stop"):
            self.run(tiny_model, tmp_path, {"no_signal_stop": 0.5})
        assert not (tmp_path / "a").exists()
