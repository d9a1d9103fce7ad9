"""Section `method` of params.yaml, `entrograd explain` and `entrograd methods`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from entrograd.cli.main import main
from entrograd.errors import InputError
from entrograd.methods.explain.explain import cluster_ids, explain
from entrograd.methods.params import MethodParams
from entrograd.methods.presets import COMPONENTS, PRESETS
from entrograd.methods.registry import recipe
from entrograd.params import check

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def choose(**section: Any) -> Any:
    return recipe(check(MethodParams, section, "method"))


class TestRecipe:
    def test_every_preset_is_its_own_four_components(self) -> None:
        assert {"grpo", "dapo", "dr_grpo", "gspo", "cispo", "high_entropy_tokens"} <= set(PRESETS)
        assert {"empo", "seed_grpo", "gtpo", "grpo_s", "encore", "asr"} <= set(PRESETS)
        for name, preset in PRESETS.items():
            chosen = choose(name=name)
            assert (chosen.name, chosen.title) == (name, name)
            assert tuple(part.name for part in chosen.components) == preset
            # the component that a method brings is called after it
            assert name in preset

    def test_four_components_of_four_methods(self) -> None:
        chosen = choose(
            name="grpo", reward="encore", advantage="gtpo", weighting="seed_grpo", loss="dapo"
        )
        assert [part.name for part in chosen.components] == ["encore", "gtpo", "seed_grpo", "dapo"]
        assert chosen.required_columns == {
            "reward_heads",
            "entropies",
            "cluster_id",
            "old_logprobs",
        }

    def test_parameters_stand_under_the_components_name(self) -> None:
        blocks = {"gtpo": {"a2": 0.3}, "seed_grpo": {"alpha": 1}}
        chosen = choose(name="gtpo", weighting="seed_grpo", **blocks)
        assert chosen.advantage.a2 == 0.3
        assert chosen.advantage.a1 == 1.0
        assert chosen.weighting.alpha == 1

    def test_the_options_of_a_loss_are_needs(self) -> None:
        block = {"kl_coefficient": 0.1, "importance_sampling": "masked"}
        assert choose(name="grpo", grpo=block).required_columns == {
            "ref_logprobs",
            "sampling_logprobs",
        }
        assert choose(name="grpo", loss="dapo", grpo=block).required_columns == set()

    @pytest.mark.parametrize(
        ("section", "message"),
        [
            ({"name": "gppo"}, r"method\.name: unknown method 'gppo'; allowed: grpo, dapo"),
            ({"name": "grpo", "advantage": "none"}, r"method\.advantage: unknown advantage 'none'"),
            ({"name": "grpo", "weighting": "sed"}, r"method\.weighting: .*: none, seed_grpo "),
            ({"name": "grpo", "reward": "singel"}, r"method\.reward: .*: single, weighted"),
            (
                {"name": "gtpo", "gtpo": {"a3": 1}},
                r"method\.gtpo\.a3: unknown key; allowed .*a1, a2",
            ),
            ({"name": "grpo", "gtpo": {"a3": 1}}, r"method\.gtpo\.a3: unknown key"),
            ({"name": "gtpo", "gtpo": {"a2": -1}}, r"method\.gtpo\.a2: .*greater than or equal"),
            ({"name": "gtpo", "gtpo": {"a2": "much"}}, r"method\.gtpo\.a2: .*number"),
            ({"name": "gtpo", "gtpo": {"a2": math.nan}}, r"method\.gtpo\.a2: "),
            ({"name": "gtpo", "gtpo": {"normalization": "x"}}, r"own_set.*with_zeros.*joint"),
            ({"name": "gtpo", "gtpo": 3}, r"method\.gtpo: expected keys and values"),
            ({"name": "gtpo", "gtpo": None}, r"method\.gtpo: expected keys and values"),
            ({"name": "gtpo", "gtop": {}}, r"method\.gtop: unknown key; allowed here: name"),
            (
                {"name": "gtpo", "gtpo": {"entropy_low": 2.0, "entropy_high": 1.0}},
                r"method\.gtpo: entropy_low .* must not exceed",
            ),
            (
                {"name": "dapo", "single": {"overlong_length": 10, "overlong_buffer": 20}},
                r"method\.single: overlong_buffer .* must not exceed",
            ),
            ({"name": "encore", "encore": {"tau": 0}}, r"method\.encore\.tau"),
            ({"name": "gspo", "gspo": {"clip_low": 2.0}}, r"method\.gspo\.clip_low"),
        ],
    )
    def test_mistakes_name_the_key(self, section: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            choose(**section)
        assert str(caught.value).startswith("params.yaml: method.")


class TestExplain:
    """The numbers of the papers and of the arithmetic by hand, from the files in docs/examples."""

    @pytest.mark.parametrize(
        ("method", "file", "settings", "expected"),
        [
            ("grpo", "group_of_four", [], [[0.8658754]] * 2 + [[-0.8658754]] * 2),
            ("dr_grpo", "group_of_four", [], [[0.5], [0.5], [-0.5], [-0.5]]),
            ("seed_grpo", "group_of_four", [], [[0.4854042]] * 2 + [[-0.4854042]] * 2),
            (
                "gtpo",
                "gtpo",
                ["normalization=own_set"],
                [[-0.5, 1.5, 0], [0.5, -1.5], [1.11803, -1.11803, 0], [-1.11803, 1.11803]],
            ),
            (
                "grpo_s",
                "grpo_s",
                [],
                [[1.029302] * 2, [0.968754] * 2, [-1.053520] * 2, [-0.944536]],
            ),
            (
                "asr",
                "asr",
                ["source=reward_model", "segmentation=token", "keep_denominator=true"],
                [[0.707007, 0, 0.707007], [0, -0.707007, 0]],
            ),
        ],
    )
    def test_advantages(
        self, method: str, file: str, settings: list[str], expected: list[list[float]]
    ) -> None:
        found = explain(method, EXAMPLES / f"{file}.json", settings)["advantages"]
        for row, wanted in zip(found, expected, strict=True):
            assert row == pytest.approx(wanted, abs=1e-5)

    def test_rewards_made_by_the_method(self) -> None:
        empo = explain("empo", EXAMPLES / "empo.json")
        assert empo["rewards"] == pytest.approx([0.6, 0.6, 0.6, 0.2, 0.2])
        given = 'entropies={"format": 0, "brevity": 0.693147, "reasoning": 1.609438}'
        encore = explain("encore", EXAMPLES / "encore.json", [given])
        assert encore["rewards"][0] == pytest.approx(0.7198405, abs=1e-6)
        assert encore["diagnostics"]["weight_format"] == pytest.approx(0.464184, abs=1e-6)

    def test_loss_where_logprobs_are_given(self) -> None:
        # s = sqrt(4 / 3), A = +-1 / (s + .0001) = +-.8659504; -(1.28 - 1.5 + .5 - .8) * A / 4
        assert explain("dapo", EXAMPLES / "clip.json")["loss"] == pytest.approx(0.1125736, abs=1e-7)
        assert "loss" not in explain("dapo", EXAMPLES / "gtpo.json")

    def test_a_mixture(self) -> None:
        found = explain(
            "dr_grpo",
            EXAMPLES / "group_of_four.json",
            ["weighting=seed_grpo", "seed_grpo.f=linear"],
        )
        # 1 - .0417 * .9996414 / ln 4 = .9699306
        assert found["advantages"][0] == pytest.approx([0.5 * 0.9699306], abs=1e-7)
        assert found["choices"]["weighting"] == "seed_grpo"
        assert found["params"]["seed_grpo"]["f"] == "linear"

    def test_equal_answers_are_a_cluster_and_none_its_own(self) -> None:
        ids = cluster_ids(["4", None, "5", "4", None, ""])
        assert ids[0] == ids[3]
        assert len(set(ids)) == 5

    @pytest.mark.parametrize(
        ("content", "method", "message"),
        [
            ("{", "grpo", "not JSON"),
            ("[1]", "grpo", "expected an object"),
            ("{}", "grpo", "one entry per completion"),
            ('{"reward": [1]}', "grpo", "reward: unknown key; allowed here: rewards"),
            ('{"rewards": [1, "a"]}', "grpo", r"rewards\[1\]: expected a finite number"),
            ('{"rewards": [1, NaN]}', "grpo", r"rewards\[1\]: expected a finite number"),
            ('{"rewards": [1], "entropies": [[1], [2]]}', "grpo", "one entry per completion"),
            ('{"rewards": [1], "entropies": [[]]}', "grpo", r"entropies\[0\]"),
            ('{"rewards": [1], "entropies": [1]}', "grpo", r"entropies\[0\]: expected a list"),
            (
                '{"rewards": [1], "entropies": [[1]], "old_logprobs": [[-1, -1]]}',
                "grpo",
                "differ in length",
            ),
            ('{"rewards": [1, 0]}', "gtpo", "entropies is missing; gtpo reads it"),
            ('{"rewards": [1, 0]}', "seed_grpo", "answers is missing"),
            ('{"answers": ["1", "2"]}', "grpo", "rewards is missing"),
            ('{"rewards": [1, 0], "answers": [[], "1"]}', "grpo", "answers: expected text"),
            ('{"rewards": [1], "max_length": 0}', "grpo", "max_length"),
            ('{"rewards": [1], "lengths": [0]}', "grpo", "lengths: expected a whole number"),
            ('{"rewards": [1, 0], "lengths": [1]}', "grpo", "one entry per completion"),
            ('{"rewards": [1], "lengths": 3}', "grpo", "lengths: expected a list"),
            ('{"rewards": [1], "lengths": [1], "entropies": [[1]]}', "grpo", "drop lengths"),
            ('{"reward_heads": [[1, 0], [1]]}', "encore", "reward_heads"),
        ],
    )
    def test_bad_files(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        content: str,
        method: str,
        message: str,
    ) -> None:
        file = tmp_path / "group.json"
        file.write_text(content)
        with pytest.raises(InputError, match=message) as caught:
            explain(method, file)
        assert str(file) in str(caught.value)
        assert main(["explain", "--method", method, "--group", str(file)]) == 2
        assert str(file) in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["a3=1"], r"^--set gtpo\.a3: unknown key"),
            (["a2"], r"^--set a2: expected key=value"),
            (["a2=-1"], r"^--set gtpo\.a2"),
            (["advantage=x"], r"^--set advantage: unknown advantage 'x'"),
            (["foo.a=1"], r"^--set foo: unknown key"),
        ],
    )
    def test_bad_settings(self, settings: list[str], message: str) -> None:
        with pytest.raises(InputError, match=message):
            explain("gtpo", EXAMPLES / "gtpo.json", settings)

    def test_command_prints_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        file = str(EXAMPLES / "gtpo.json")
        arguments = [
            "explain",
            "--method",
            "gtpo",
            "--group",
            file,
            "--set",
            "a2=0",
            "--set",
            "a1=2",
        ]
        assert main(arguments) == 0
        answer = json.loads(capsys.readouterr().out)
        assert list(answer)[:1] == ["method"]
        assert (answer["params"]["gtpo"]["a1"], answer["params"]["gtpo"]["a2"]) == (2.0, 0.0)
        # a2 = 0: one advantage a set; with_zeros at five and five tokens: +-1
        assert answer["advantages"][0] == pytest.approx([1.0] * 3)


def test_methods_command_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in table["methods"]] == list(PRESETS)
    for row in table["methods"]:
        assert row["components"] == PRESETS[row["name"]]._asdict()
    components = [(row["choice"], row["name"]) for row in table["components"]]
    assert components == [(choice, name) for choice in COMPONENTS for name in COMPONENTS[choice]]
    assert all(row["paper"] and row["equation"] for row in table["components"])
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("seed_grpo "))
    assert line.split() == [
        *("seed_grpo", "single", "dr_grpo", "seed_grpo", "dr_grpo", "cluster_id,", "old_logprobs")
    ]
    assert "required columns: cluster_id, old_logprobs" in text


def test_every_method_has_its_section_in_the_papers_page() -> None:
    page = (EXAMPLES.parent / "papers.md").read_text(encoding="utf-8")
    for name in PRESETS:
        assert f"`{name}`" in page, name
    for name, preset in PRESETS.items():
        assert f"| `{name}` | {' | '.join(preset)} |" in page, name
    for choice, names in COMPONENTS.items():
        for name in names:
            assert f"methods/{choice}/{name}.py" in page, (choice, name)
