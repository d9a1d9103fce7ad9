"""What every preset is: its components, their defaults, its aggregation, and who reads a parameter.

The table is written out from the mathematics, a value at a time; nothing in it is computed.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import yaml

from entrograd.errors import InputError
from entrograd.methods import presets
from entrograd.methods.batch import Batch, denominators
from entrograd.methods.components import KINDS, AdvantageEstimator, Component, PolicyLoss
from entrograd.methods.params import MethodParams
from entrograd.methods.presets import COMPONENTS, PRESETS
from entrograd.methods.registry import component, recipe
from entrograd.numerics import aggregate
from entrograd.params import check
from entrograd.pipeline.modules import reached_by_name
from helpers.method_batches import HEADS, group, make_batch
from helpers.paths import SHIPPED

LOSS = {
    "kl_coefficient": 0.0,
    "kl_estimator": "k3",
    "importance_sampling": "none",
    "importance_sampling_level": "token",
    "importance_sampling_cap": 2.0,
}
OVERLONG = {"overlong_length": None, "overlong_buffer": 4096}
DR_GRPO = {"clip_low": 0.2, "clip_high": 0.2, **LOSS, **OVERLONG}
GRPO = {"epsilon": 1e-4, **DR_GRPO}

# preset: (its components, its aggregation, every parameter of theirs)
EXPECTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grpo": ("single grpo none grpo", "sequence_mean", GRPO),
    "dapo": ("single grpo none dapo", "token_mean", {**GRPO, "clip_high": 0.28}),
    "dr_grpo": ("single dr_grpo none dr_grpo", "constant_length", DR_GRPO),
    "gspo": (
        "single grpo none gspo",
        "sequence_mean",
        {**GRPO, "clip_low": 3e-4, "clip_high": 4e-4},
    ),
    "cispo": (
        "single grpo none cispo",
        "token_mean",
        {"epsilon": 1e-4, "clip_high": 4.0, **LOSS, **OVERLONG},
    ),
    "high_entropy_tokens": (
        "single high_entropy_tokens none dapo",
        "token_mean",
        {**GRPO, "clip_high": 0.28, "fraction": 0.2},
    ),
    "empo": ("empo grpo none grpo", "sequence_mean", GRPO),
    "seed_grpo": (
        "single dr_grpo seed_grpo dr_grpo",
        "constant_length",
        {**DR_GRPO, "alpha": 0.0417, "estimator": "rao", "f": "reciprocal", "gamma": 2.0},
    ),
    "gtpo": (
        "single gtpo none dapo",
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
            **OVERLONG,
        },
    ),
    "grpo_s": (
        "single grpo_s none grpo_s",
        "sequence_mean",
        {
            "b1": 1.0,
            "b2": 0.1,
            "epsilon": 1e-8,
            "clip_low": 0.2,
            "clip_high": 0.28,
            **LOSS,
            **OVERLONG,
        },
    ),
    "encore": (
        "encore grpo none grpo",
        "sequence_mean",
        {**GRPO, "tau": 2.0, "log_base": math.e, "entropies": {}},
    ),
    "asr": (
        "single asr none grpo",
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
    "weighted": ("weighted grpo none grpo", "sequence_mean", {**GRPO, "weights": {"reward": 1.0}}),
}
# the ratio that a loss clips, of three tokens with log-ratios (.1, -.2, .3)
RATIOS = {"gspo": [1.0689391] * 3, "grpo_s": [1.0912535] * 3}
TOKEN_RATIOS = [1.1051709, 0.8187308, 1.3498588]


def choose(**section: Any) -> Any:
    return recipe(check(MethodParams, section, "method"))


@pytest.mark.parametrize("name", list(EXPECTED))
def test_components_defaults_and_aggregation(name: str) -> None:
    names, aggregation, params = EXPECTED[name]
    chosen = choose(name=name)
    assert [part.name for part in chosen.components] == names.split()
    assert [type(part) for part in chosen.components] == [
        component(kind, part) for kind, part in zip(KINDS, names.split(), strict=True)
    ]
    values = [item for part in chosen.components for item in dataclasses.asdict(part).items()]
    assert dict(values) == params
    assert len(values) == len(params)  # no parameter of two components in use
    loss, mask = torch.tensor([[1.0, 2.0], [4.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    counts = denominators(Batch(mask, mask[:, 0].long(), loss[:, 0], loss), 7)
    assert chosen.aggregate(loss, mask, counts) == getattr(aggregate, aggregation)(
        loss, mask, counts
    )


@pytest.mark.parametrize("name", [name for name in COMPONENTS["loss"] if name != "cispo"])
def test_the_ratio_that_is_clipped(name: str) -> None:
    batch = group([1], old_logprobs=[[-1.0, -1.0, -1.0]])
    now = torch.tensor([[-0.9, -1.2, -0.7]], dtype=torch.float64)
    block = {"clip_low": 1.0, "clip_high": 9.0}
    loss = choose(name="grpo", loss=name, **{name: block}).policy_loss(
        now, torch.ones_like(now), batch
    )
    assert (-loss[0]).tolist() == pytest.approx(RATIOS.get(name, TOKEN_RATIOS), abs=1e-7)


def test_every_method_stands_in_the_table() -> None:
    assert set(EXPECTED) == set(PRESETS)


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


EVERY = [(kind, name) for kind in KINDS for name in COMPONENTS[kind.choice]]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_component_reads_its_parameters_and_they_are_its_alone(
    kind: type[Component], name: str
) -> None:
    """Every field is read by what the component computes; none is read by another one."""
    part, batch = component(kind, name), make_batch(3)
    assert (part.name, part.choice) == (name, kind.choice)
    read: set[str] = set()
    recording = type(part.__name__, (part,), {"__getattribute__": _recorder(read)})
    fields = {item.name for item in dataclasses.fields(part)}
    now = torch.where(batch.completion_mask, batch.old_logprobs + 0.1, 0.0)
    block: dict[str, Any] = dict(HEADS.get(name, {}))
    if kind.choice == "reward":
        block |= {"overlong_length": 4, "overlong_buffer": 2}
    if kind.choice == "loss":
        block |= {"kl_coefficient": 0.1, "importance_sampling": "truncated"}
    if name == "seed_grpo":
        block["f"] = "focal"
    for more in ({}, {"segmentation": "entropy_cutoff"}) if name == "asr" else ({},):
        built = recording(**{**block, **more})
        read.clear() if not more else None
        if kind.choice == "reward":
            built.rewards(batch)
        elif kind.choice == "advantage":
            built.advantages(batch), built.loss_mask(batch)
        elif kind.choice == "weighting":
            built.weights(batch)
        else:
            built.losses(now, now, batch)
    assert read & fields == fields


def _recorder(read: set[str]) -> Any:
    def note(self: Any, name: str) -> Any:
        read.add(name)
        return object.__getattribute__(self, name)

    return note


def test_a_parameter_of_a_name_belongs_to_one_component() -> None:
    """Components of one name share a block of params.yaml: no key of it is another one's too."""
    for name in {name for _, name in EVERY}:
        parts = [component(kind, name) for kind in KINDS if name in COMPONENTS[kind.choice]]
        keys = Counter(item.name for part in parts for item in dataclasses.fields(part))
        assert all(count == 1 for count in keys.values()), name


def test_a_recipe_holds_parameters_of_its_components_alone() -> None:
    chosen = choose(name="grpo", grpo={"epsilon": 0.5, "clip_high": 0.3, "kl_coefficient": 0.1})
    assert chosen.advantage.epsilon == 0.5
    assert (chosen.loss.clip_high, chosen.loss.kl_coefficient) == (0.3, 0.1)
    assert not hasattr(chosen.advantage, "clip_high")
    assert not hasattr(chosen.loss, "epsilon")


class TestKeys:
    @pytest.mark.parametrize(
        ("section", "message"),
        [
            ({"name": "gtpo", "gtpo": {"clip_low": 0.1}}, "gtpo.clip_low: .* loss in use: set "
             "method.dapo.clip_low"),
            ({"name": "gspo", "gspo": {"epsilon": 0.1}}, "gspo.epsilon: .* advantage in use: set "
             "method.grpo.epsilon"),
            ({"name": "dapo", "dapo": {"overlong_length": 9}}, "dapo.overlong_length: .* reward in "
             "use: set method.single.overlong_length"),
            ({"name": "gtpo", "gtpo": {"f": "linear"}}, "gtpo.f: unknown key; allowed here: a1"),
            ({"name": "gtpo", "credit": "grpo"}, "credit: is named method.advantage now"),
            ({"name": "gtpo", "modulation": "none"}, "modulation: is named method.weighting now"),
            ({"name": "gtpo", "loss": "gtpo"}, "method.loss: unknown loss 'gtpo'; allowed: grpo"),
        ],
    )  # fmt: skip
    def test_mistakes(self, section: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            choose(**section)
        assert str(caught.value).startswith("params.yaml: method")


class TestNewComponent:
    """A component is one file and one line: nothing else knows its name."""

    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @dataclasses.dataclass(frozen=True)
        class Sign(AdvantageEstimator):
            name = "sign"
            paper, equation = "made up", "A_i = scale sign(r_i - mean r)"
            scale: float = 2.0

            def advantages(self, batch: Batch) -> torch.Tensor:
                above = batch.rewards - batch.rewards.mean()
                return batch.to_tokens(self.scale * above.sign())

        module = ModuleType("made_up_component")
        module.Sign = Sign  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "made_up_component", module)
        monkeypatch.setitem(presets.COMPONENTS["advantage"], "sign", "made_up_component:Sign")

    def test_is_chosen_by_name_and_takes_parameters(self) -> None:
        chosen = choose(name="grpo", advantage="sign", sign={"scale": 3.0})
        assert chosen.title == "grpo (advantage: sign)"
        assert chosen.advantages(group([1, 0])).tolist() == [[3.0], [-3.0]]
        with pytest.raises(InputError, match=r"method\.sign\.scale"):
            choose(name="grpo", advantage="sign", sign={"scale": "much"})

    def test_makes_a_preset_with_another_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        preset = presets.Preset("single", "sign", "seed_grpo", "dapo")
        monkeypatch.setitem(presets.PRESETS, "new", preset)
        assert choose(name="new").required_columns == {"cluster_id", "old_logprobs"}

    def test_a_component_of_another_kind_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(presets.COMPONENTS["loss"], "sign", "made_up_component:Sign")
        with pytest.raises(TypeError, match="Sign is no PolicyLoss"):
            component(PolicyLoss, "sign")


class TestFiles:
    def files(self, **section: Any) -> set[str]:
        root = Path(presets.__file__).parent
        paths = reached_by_name(check(MethodParams, section, "method").modules)
        return {p.relative_to(root).as_posix() for p in paths if p.is_relative_to(root)}

    def test_are_those_of_the_components_in_use_and_of_what_they_import(self) -> None:
        shared = {"batch.py", "components.py", "parameters.py"}
        used = {"reward/single.py", "advantage/gtpo.py", "weighting/none.py", "loss/dapo.py"}
        assert self.files(name="gtpo") == shared | used | {"loss/grpo.py"}
        seed = {"weighting/seed_grpo.py", "semantic_entropy.py"}
        found = self.files(name="grpo_s", weighting="seed_grpo", gspo={"clip_low": 0.1})
        parts = {"reward/single.py", "advantage/grpo_s.py", "advantage/gtpo.py"}
        assert found == shared | seed | parts | {"loss/grpo_s.py", "loss/grpo.py"}

    def test_a_run_imports_the_components_it_uses_alone(self) -> None:
        import subprocess

        code = (
            "import sys; from entrograd.methods.registry import recipe; "
            "from entrograd.methods.params import MethodParams; "
            "recipe(MethodParams(name='gtpo')); print(*sorted(sys.modules))"
        )
        loaded = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        components = {
            module.removeprefix("entrograd.methods.")
            for module in loaded
            if module.count(".") == 3 and module.startswith("entrograd.methods.")
        }
        assert components == {
            *("reward.single", "advantage.gtpo", "weighting.none", "loss.dapo", "loss.grpo")
        }


class TestParametersWithoutEffect:
    @pytest.mark.parametrize(
        ("section", "message"),
        [
            (
                {"name": "gtpo", "weighted": {"overlong_length": 8192}},
                r"method\.weighted\.overlong_length: no component reads it: the reward is single; "
                r"set method\.reward: weighted, or method\.single\.overlong_length",
            ),
            (
                {"name": "dapo", "reward": "encore", "single": {"overlong_length": 8192}},
                r"the reward is encore",
            ),
            (
                {"name": "empo", "reward": "single", "empo": {"overlong_length": 8192}},
                r"the reward is single",
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
                [
                    "grpo.clip_low = 0.3 has no effect",
                    "the loss is dapo; set method.loss: grpo",
                ],
            ),
            (
                {"name": "grpo", "seed_grpo": {"alpha": 1, "f": "linear"}},
                ["seed_grpo.alpha = 1.0", "seed_grpo.f = linear", "the weighting is none"],
            ),
            ({"name": "gtpo", "advantage": "grpo", "gtpo": {"a2": 0.3}}, ["the advantage is grpo"]),
            (
                {"name": "dapo", "advantage": "gtpo", "grpo": {"epsilon": 0.0}},
                ["advantage is gtpo"],
            ),
            # what is read, and what stands there as it is by default
            ({"name": "grpo", "loss": "dapo", "grpo": {"clip_low": 0.2, "epsilon": 0.1}}, []),
            ({"name": "grpo", "gtpo": {"a1": 1.0, "normalization": "with_zeros"}}, []),
            ({"name": "gtpo", "single": {"overlong_length": 8192}}, []),
            # the diagnostics' semantic entropy is by this estimator, whatever the weighting
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

    @pytest.mark.parametrize("name", list(PRESETS))
    def test_the_parameters_as_shipped_fit_any_method(
        self, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        shipped = yaml.safe_load(SHIPPED.read_text())["method"]
        for section in ({**shipped, "name": name}, {**shipped, "name": name, "weighting": "none"}):
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
            ("single", {}, [0.0, 0.5]),
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

    @pytest.mark.parametrize("name", ["single", "encore", "weighted", "empo"])
    def test_a_buffer_longer_than_the_length_is_refused(self, name: str) -> None:
        with pytest.raises(InputError, match=rf"method\.{name}: overlong_buffer .* must not"):
            choose(
                name="grpo", reward=name, **{name: {"overlong_length": 10, "overlong_buffer": 20}}
            )
