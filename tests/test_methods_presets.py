"""What every preset is: its defaults, its loss and aggregation, and which choice reads a parameter.

The table is written out from the mathematics, a value at a time; nothing in it is computed.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, ClassVar

import pytest
import torch
import yaml

from entrograd.errors import InputError
from entrograd.methods.options import read_by
from entrograd.methods.params import MethodParams
from entrograd.methods.registry import METHODS, recipe
from entrograd.params import check
from helpers.method_batches import HEADS, group, make_batch
from helpers.paths import ROOT

LOSS = {
    "kl_coefficient": 0.0,
    "kl_estimator": "k3",
    "importance_sampling": "none",
    "importance_sampling_level": "token",
    "importance_sampling_cap": 2.0,
}
GRPO = {"epsilon": 1e-4, "clip_low": 0.2, "clip_high": 0.2, **LOSS}
OVERLONG = {"overlong_length": None, "overlong_buffer": 4096}

# preset: (its loss's formula, its aggregation, every parameter)
PRESETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grpo": ("grpo", "sequence_mean", GRPO),
    "dapo": ("grpo", "token_mean", {**GRPO, "clip_high": 0.28, **OVERLONG}),
    "dr_grpo": ("grpo", "constant_length", {"clip_low": 0.2, "clip_high": 0.2, **LOSS}),
    "gspo": (
        "gspo",
        "sequence_mean",
        {"epsilon": 1e-4, "clip_low": 3e-4, "clip_high": 4e-4, **LOSS},
    ),
    "cispo": ("cispo", "token_mean", {"epsilon": 1e-4, "clip_high": 4.0, **LOSS}),
    "high_entropy_tokens": ("grpo", "token_mean", {**GRPO, "clip_high": 0.28, "share": 0.2}),
    "empo": ("grpo", "sequence_mean", {**GRPO, **OVERLONG}),
    "seed_grpo": (
        "grpo",
        "constant_length",
        {
            "clip_low": 0.2,
            "clip_high": 0.2,
            "alpha": 0.0417,
            "estimator": "rao",
            "f": "reciprocal",
            "gamma": 2.0,
            **LOSS,
        },
    ),
    "gtpo": (
        "grpo",
        "token_mean",
        {
            "a1": 1.0,
            "a2": 0.1,
            "normalization": "with_zeros",
            "epsilon": 1e-8,
            "entropy_low": None,
            "entropy_high": None,
            "clip_low": 0.2,
            "clip_high": 0.28,
            **LOSS,
        },
    ),
    "grpo_s": (
        "grpo_s",
        "sequence_mean",
        {"b1": 1.0, "b2": 0.1, "epsilon": 1e-8, "clip_low": 0.2, "clip_high": 0.28, **LOSS},
    ),
    "encore": (
        "grpo",
        "sequence_mean",
        {**GRPO, **OVERLONG, "tau": 2.0, "log_base": math.e, "entropies": {}},
    ),
    "asr": (
        "grpo",
        "sequence_mean",
        {
            **GRPO,
            "source": "implicit_reward",
            "beta": 0.1,
            "segmentation": "change",
            "delta": 0.1,
            "baseline": 0.0,
            "min_length": 3,
            "cutoff": 1.75,
            "keep_denominator": False,
        },
    ),
    "weighted": ("grpo", "sequence_mean", {**GRPO, **OVERLONG, "weights": {"reward": 1.0}}),
}


def choose(**section: Any) -> Any:
    return recipe(check(MethodParams, section, "method"))


@pytest.mark.parametrize("name", list(PRESETS))
def test_defaults_loss_and_aggregation(name: str) -> None:
    formula, aggregation, params = PRESETS[name]
    method, chosen = METHODS[name], choose(name=name)
    assert dataclasses.asdict(method.params()) == params
    assert dataclasses.asdict(chosen.params[name]) == params
    assert method.aggregate.__name__ == aggregation
    assert method.policy_loss is METHODS[formula].policy_loss


def test_every_method_stands_in_the_table() -> None:
    assert set(PRESETS) == set(METHODS)


# What each preset's columns are at its defaults, by the one thing that tells them.
@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("grpo", set()),
        ("gtpo", {"entropies"}),
        ("empo", {"cluster_id"}),
        ("seed_grpo", {"cluster_id", "old_logprobs"}),
        ("asr", {"old_logprobs", "ref_logprobs"}),
        ("encore", {"reward_heads"}),
        ("weighted", set()),
    ],
)
def test_needs_of_a_method_are_those_of_its_preset(name: str, columns: set[str]) -> None:
    assert METHODS[name].required_columns == columns
    assert choose(name=name).required_columns == columns


def test_the_columns_of_token_scores_and_cuts() -> None:
    for block, columns in (
        ({"source": "entropy"}, {"entropies"}),
        ({"source": "reward_model"}, {"token_scores"}),
        (
            {"source": "reward_model", "segmentation": "entropy_cutoff"},
            {"token_scores", "entropies"},
        ),
        ({"source": "entropy", "segmentation": "stored"}, {"entropies", "segment_ids"}),
    ):
        assert choose(name="asr", asr=block).required_columns == columns


class Recorder:
    """Parameters that note which of them are read."""

    def __init__(self, params: Any) -> None:
        self.__dict__.update(given=params, read=set())

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self.given, name)


@pytest.mark.parametrize("name", list(METHODS))
def test_a_parameter_is_read_by_the_choice_it_is_said_to_be(name: str) -> None:
    method, batch = METHODS[name], make_batch(3)
    block: dict[str, Any] = {**HEADS.get(name, {}), "kl_coefficient": 0.1}
    block["importance_sampling"] = "truncated"
    if hasattr(method.params(), "overlong_length"):
        block |= {"overlong_length": 4, "overlong_buffer": 2}
    if name == "seed_grpo":
        block["f"] = "focal"
    now = torch.where(batch.completion_mask, batch.old_logprobs + 0.1, 0.0)
    found: set[str] = set()
    for more in ({}, {"segmentation": "entropy_cutoff"}) if name == "asr" else ({},):
        params = choose(name=name, **{name: {**block, **more}}).params[name]
        for choice, call in (
            ("reward", lambda p: method.compose_rewards(batch, p)),
            ("credit", lambda p: (method.advantages(batch, p), _masked(method, batch, p))),
            ("modulation", lambda p: method.modulate(batch, p)),
            ("loss", lambda p: method.policy_loss(now, now, batch, p)),
        ):
            recorder = Recorder(params)
            call(recorder)
            assert {read_by(method, read) for read in recorder.read} <= {choice}, recorder.read
            found |= recorder.read
    assert found == {field.name for field in dataclasses.fields(method.params)}


def _masked(method: Any, batch: Any, params: Any) -> Any:
    return method.loss_mask and method.loss_mask(batch, params)


class TestParametersWithoutEffect:
    @pytest.mark.parametrize(
        ("section", "message"),
        [
            (
                {"name": "gtpo", "loss": "dapo", "dapo": {"overlong_length": 8192}},
                r"method\.dapo\.overlong_length: no choice reads it: the reward is gtpo's; "
                r"set method\.reward: dapo, or overlong_length of the reward in use",
            ),
            (
                {"name": "dapo", "reward": "encore", "dapo": {"overlong_length": 8192}},
                r"the reward is encore's",
            ),
            (
                {"name": "dapo", "reward": "single", "dapo": {"overlong_length": 8192}},
                r"the reward is grpo's",
            ),
        ],
    )
    def test_an_overlong_penalty_that_nobody_applies_is_refused(
        self, section: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            choose(**section)

    @pytest.mark.parametrize(
        ("section", "warned"),
        [
            (
                {"name": "grpo", "loss": "dapo", "grpo": {"clip_low": 0.3}},
                ["method.grpo.clip_low = 0.3 has no effect", "the loss is dapo's"],
            ),
            (
                {"name": "grpo", "seed_grpo": {"alpha": 1, "f": "linear"}},
                ["seed_grpo.alpha = 1.0", "seed_grpo.f = linear", "the modulation is grpo's"],
            ),
            ({"name": "gtpo", "credit": "grpo", "gtpo": {"a2": 0.3}}, ["the credit is grpo's"]),
            ({"name": "dapo", "credit": "gtpo", "dapo": {"epsilon": 0.0}}, ["the credit is gtpo"]),
            # what is read, and what stands there as it is by default
            ({"name": "grpo", "loss": "dapo", "grpo": {"clip_low": 0.2, "epsilon": 0.1}}, []),
            ({"name": "grpo", "gtpo": {"a1": 1.0, "normalization": "with_zeros"}}, []),
            ({"name": "gtpo", "reward": "dapo", "dapo": {"overlong_length": 8192}}, []),
            # the diagnostics' semantic entropy is by this estimator, whatever the modulation
            ({"name": "grpo", "seed_grpo": {"estimator": "discrete"}}, []),
        ],
    )
    def test_any_other_is_a_warning(
        self, section: dict[str, Any], warned: list[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, logger="entrograd"):
            choose(**section)
        assert bool(caplog.text) == bool(warned)
        assert all(words in caplog.text for words in warned)

    @pytest.mark.parametrize("name", list(METHODS))
    def test_the_parameters_as_shipped_fit_any_method(
        self, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        shipped = yaml.safe_load((ROOT / "params.yaml").read_text())["method"]
        for section in ({**shipped, "name": name}, {**shipped, "name": name, "modulation": "none"}):
            choose(**section)
        assert not caplog.text


class TestOverlongPenaltyOfEveryComposition:
    """Lengths 4 and 3 with Lmax 4, Lc 2: penalties -1 and -.5 on what is composed."""

    block: ClassVar = {"overlong_length": 4, "overlong_buffer": 2}
    batch = group(
        [1, 1],
        entropies=[[1] * 4, [1] * 3],
        reward_heads=[[1.0], [0.5]],
        head_names=("a",),
        cluster_ids=[0, 1],
        answered=torch.tensor([True, True]),
    )

    @pytest.mark.parametrize(
        ("name", "block", "rewards"),
        [
            ("dapo", {}, [0.0, 0.5]),
            ("encore", {"entropies": {"a": 0.3}}, [0.0, 0.0]),
            ("weighted", {"weights": {"reward": 1.0, "a": 1.0}}, [1.0, 1.0]),
            ("empo", {}, [-0.5, 0.0]),
        ],
    )
    def test_rewards(self, name: str, block: dict[str, Any], rewards: list[float]) -> None:
        chosen = choose(name="grpo", reward=name, **{name: {**self.block, **block}})
        assert chosen.rewarded(self.batch).rewards.tolist() == rewards
        plain = choose(name="grpo", reward=name, **{name: block}).rewarded(self.batch).rewards
        assert (plain - chosen.rewarded(self.batch).rewards).tolist() == [1.0, 0.5]

    @pytest.mark.parametrize("name", ["dapo", "encore", "weighted", "empo"])
    def test_a_buffer_longer_than_the_length_is_refused(self, name: str) -> None:
        with pytest.raises(InputError, match=rf"method\.{name}: overlong_buffer .* must not"):
            choose(name=name, **{name: {"overlong_length": 10, "overlong_buffer": 20}})
