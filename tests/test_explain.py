"""What `entrograd explain` accepts, refuses and leaves out; `entrograd methods` and `check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from entrograd.cli.main import main

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
FOUR = EXAMPLES / "group_of_four.json"
RATED = '{"rewards": [1, 0], "reward_heads": {"a": [1, 0]}}'


class Explained:
    """`entrograd explain`, with a file's content or path."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.file, self.capsys = folder / "group.json", capsys

    def run(self, method: str, group: str | bytes | Path, *settings: str) -> tuple[int, str, str]:
        if not isinstance(group, Path):
            self.file.write_bytes(group.encode() if isinstance(group, str) else group)
            group = self.file
        given = ["--set", *settings] if settings else []
        code = main(["explain", "--method", method, "--group", str(group), *given])
        return code, *self.capsys.readouterr()

    def answer(self, method: str, group: str | bytes | Path, *settings: str) -> Any:
        code, out, err = self.run(method, group, *settings)
        assert (code, err) == (0, "")
        return json.loads(out)

    def error(self, method: str, group: str | bytes | Path, *settings: str) -> str:
        """What is said on stderr, one sentence, when the exit code is 2 and nothing is printed."""
        code, out, err = self.run(method, group, *settings)
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err.removeprefix("entrograd explain: error: ")


@pytest.fixture
def explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Explained:
    return Explained(tmp_path, capsys)


@pytest.mark.parametrize("method", ["gtpo", "grpo_s"])
def test_completions_stay_correct_under_composed_rewards(method: str, explained: Explained) -> None:
    """What is shown on the way has the side of what comes of it: the second one is wrong."""
    found = explained.answer(method, EXAMPLES / "composed_rewards.json", "reward=encore")
    shaped = found["working"][method]["shaped_rewards"][1]
    shaped = shaped if isinstance(shaped, list) else [shaped]
    assert found["rewards"][1] > 0
    assert max(shaped) < 0
    assert max(found["advantages"][1]) < 0


class TestFiles:
    def test_a_folder(self, explained: Explained, capsys: pytest.CaptureFixture[str]) -> None:
        assert "examples: cannot be read: Is a directory" in explained.error("grpo", EXAMPLES)
        assert main(["explain", "--method", "grpo", "--group", ""]) == 2
        assert "cannot be read" in capsys.readouterr().err

    def test_a_byte_order_mark_is_no_matter(self, explained: Explained) -> None:
        text = FOUR.read_bytes()
        assert explained.answer("grpo", b"\xef\xbb\xbf" + text) == explained.answer("grpo", FOUR)

    @pytest.mark.parametrize("depth", [900, 2500, 100_000])
    def test_nesting(self, depth: int, explained: Explained) -> None:
        nested = '{"rewards": ' + "[" * depth + "]" * depth + "}"
        assert "{" not in explained.error("grpo", nested)  # a sentence, neither JSON nor traceback

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"rewards": [1' + "0" * 400 + "]}", "rewards[0]: expected a finite number"),
            ('{"rewards": [1' + "0" * 5000 + "]}", "not JSON"),
            ('{"rewards": [1e308, -1e308]}', "rewards[0]: expected a finite number of size up to"),
            ('{"rewards": [1, 0], "lengths": [100000000000, 2]}', "lengths: expected a whole"),
            ('{"rewards": [1, 0], "lengths": [16777216, 2]}', "lengths: 2 completions of up to"),
            ('{"rewards": [1], "max_length": 1' + "0" * 400 + "}", "max_length: expected a whole"),
            ('{"lengths": [1, 2]}', "rewards is missing"),
            ('{"rewards": [1, 0], "rewards": [1, 1]}', "the key 'rewards' appears twice"),
            ('{"rewards": [1], "entropies": [[-0.1]]}', "entropies[0][0]: .* at least 0"),
            ('{"rewards": [1], "logprobs": [[0.1]]}', "logprobs[0][0]: .* at most 0"),
            ('{"rewards": [1], "old_logprobs": [[1]]}', "old_logprobs[0][0]: .* at most 0"),
            ('{"rewards": [1], "ref_logprobs": [[1]]}', "ref_logprobs[0][0]: .* at most 0"),
            ('{"rewards": [1], "sampling_logprobs": [[1]]}', "sampling_logprobs[0][0]: .* most 0"),
            ('{"rewards": [1], "reward_heads": {"a": [5]}}', "reward_heads.a[0]: .* from 0 to 1"),
            ('{"rewards": [1], "reward_heads": [[-2]]}', "reward_heads.head_0[0]: .* from 0 to 1"),
            ('{"rewards": [1], "reward_heads": {"reward": [1]}}', "reward_heads.reward: this name"),
            ('{"rewards": [1], "answers": [true]}', "answers: expected text"),
            ('{"rewards": [1], "answers": [NaN]}', "answers[0]: expected a finite number"),
            ('{"rewards": [1], "segment_ids": [[0, 2]]}', "segment_ids[0]: .* from 0 to 1"),
            ('{"rewards": [1], "segment_ids": [[0, 0.5]]}', "segment_ids[0]: .* whole number"),
            ('{"rewards": [1, 0], "answer_graph": [[0], [0]]}', "answer_graph[0]: expected a list"),
            ('{"rewards": [1, 0], "answer_graph": [[0, 1], [2, 0]]}', "an edge has one weight"),
            ('{"rewards": [1, 0], "answer_graph": [[1, 0], [0, 0]]}', "answer_graph[0][0]: .* 0"),
            ('{"rewards": [1, 0], "answer_graph": [[0, -1], [-1, 0]]}', "graph[0][1]: .* least 0"),
        ],
    )
    def test_what_cannot_be(self, content: str, message: str, explained: Explained) -> None:
        said = explained.error("grpo", content)
        place = 0
        for part in message.split(" .* "):
            place = said.index(part, place)
        assert str(explained.file) in said

    def test_answers_are_compared_as_text_and_numbers_as_numbers(
        self, explained: Explained
    ) -> None:
        group = '{"rewards": [1, 0, 0, 1], "answers": [1, 1.0, "1", "1.0"]}'
        found = explained.answer("seed_grpo", group, "estimator=discrete")
        assert found["working"]["seed_grpo"]["cluster_mass"] == [0.75] * 3 + [0.25]

    def test_stored_segments(self, explained: Explained) -> None:
        scored = '{"rewards": [1, 0], "token_scores": [[0.3, -0.1, 0.2], [0.3, -0.5]]'
        chosen = ["source=reward_model", "segmentation=stored"]
        cut = scored + ', "segment_ids": [[0, 0, 1], [0, 0]]}'
        found = explained.answer("asr", cut, *chosen)["working"]["asr"]
        assert found["segments"] == [[0, 0, 1], [0, 0]]
        assert found["segment_scores"][0] == pytest.approx([0.1, 0.1, 0.2])
        assert found["segment_scores"][1] == pytest.approx([-0.1, -0.1])
        said = explained.error("asr", scored + "}", *chosen)
        assert "segment_ids is missing; asr.segmentation=stored reads it" in said

    def test_a_head_of_any_name_is_printed(self, explained: Explained) -> None:
        found = explained.answer("encore", RATED.replace('"a"', r'"\ud800é"'))
        assert found["diagnostics"]["weight_\ud800é"] == 1

    @pytest.mark.parametrize("file", ["empo", "encore"])
    def test_without_graded_rewards_nothing_is_told_of_them(
        self, file: str, explained: Explained
    ) -> None:
        found = explained.answer(file, EXAMPLES / f"{file}.json")["diagnostics"]
        assert "zero_signal_fraction" in found
        told = {"reward_mean", "advantage_correct", "advantage_wrong"}
        assert not (told | {"positive_correct", "negative_wrong"}) & set(found)


class TestSettings:
    def test_a_plain_key_is_a_parameter_of_whichever_component_has_it(
        self, explained: Explained
    ) -> None:
        group = EXAMPLES / "gtpo.json"
        found = explained.answer("gtpo", group, "clip_low=0.1", "a2=0.3", "overlong_buffer=9")
        assert found["choices"] == {
            **{"reward": "single", "advantage": "gtpo"},
            **{"weighting": "none", "loss": "dapo"},
        }
        assert found["params"]["dapo"]["clip_low"] == 0.1
        assert found["params"]["gtpo"]["a2"] == 0.3
        assert found["params"]["single"]["overlong_buffer"] == 9
        found = explained.answer("gtpo", group, "clip_low=0.1", "loss=gspo")
        assert found["params"]["gspo"]["clip_low"] == 0.1

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["name.x=1"], "--set name: unknown key; before the dot stands one of single"),
            (["advantage=gtpo", "advantage.x=1"], "--set advantage: unknown key"),
            (["reward=encore", "reward.tau=1"], "--set reward: unknown key"),
            (["advantage="], "--set advantage=: name a component"),
            (["=1"], "--set =1: expected key=value, the key a parameter of grpo, COMPONENT."),
            (["gtpo.a.b=1"], "--set gtpo.a.b=1: expected key=value"),
            ([".a=1"], "--set .a=1: expected key=value"),
            (["gtpo.=1"], "--set gtpo.=1: expected key=value"),
            (["epsilon=" + "[" * 100_000], "--set grpo.epsilon: "),
            (["epsilon=1" + "0" * 400], "--set grpo.epsilon: "),
        ],
    )
    def test_mistakes(self, settings: list[str], message: str, explained: Explained) -> None:
        assert explained.error("grpo", FOUR, *settings).startswith(message)

    def test_an_unknown_method(self, explained: Explained) -> None:
        said = explained.error("grpoo", FOUR)
        assert said.startswith("--method grpoo: unknown method; there is grpo")
        assert "weighted" in explained.error("?", FOUR)

    def test_rewards_that_overflow(self, explained: Explained) -> None:
        weights = 'weights={"reward": 10, "a": 1}'
        assert explained.answer("weighted", RATED, weights)["rewards"] == [11, 0]
        large = RATED.replace("[1, 0]", "[1e38, 0]", 1)
        said = explained.error("weighted", large, weights)
        assert f"{explained.file}: the reward that weighted composes of completion 0 is" in said
        said = explained.error("weighted", RATED, 'weights={"b": 1}')
        assert said.startswith("--set weighted.weights.b: no such reward head")

    def test_values_that_overflow(self, explained: Explained) -> None:
        said = explained.error("gtpo", '{"rewards": [9, 0], "entropies": [[1], [1]]}', "a1=1e308")
        assert "working.gtpo.shaped_rewards[0][0] becomes inf" in said

    @pytest.mark.parametrize(
        ("method", "settings", "message"),
        [
            (
                "grpo",
                ["importance_sampling=masked"],
                "sampling_logprobs is missing; grpo.importance_sampling=masked",
            ),
            ("grpo", ["kl_coefficient=0.5"], "ref_logprobs is missing; grpo.kl_coefficient=0.5"),
            ("grpo", ["advantage=gtpo"], "entropies is missing; gtpo reads it"),
            ("asr", ["source=entropy"], "entropies is missing; asr.source=entropy reads it"),
            ("asr", [], "ref_logprobs is missing; asr reads it"),
        ],
    )
    def test_who_reads_what_is_missing(
        self, method: str, settings: list[str], message: str, explained: Explained
    ) -> None:
        assert message in explained.error(method, FOUR, *settings)


class TestMethods:
    def tables(self, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        assert main(["methods", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        components = {f"{row['choice']} {row['name']}": row for row in told["components"]}
        return {row["name"]: row for row in told["methods"]}, components

    def test_columns_are_those_at_the_defaults(self, capsys: pytest.CaptureFixture[str]) -> None:
        methods, components = self.tables(capsys)
        for name, columns in (
            ("weighted", []),
            ("encore", ["reward_heads"]),
            ("asr", ["old_logprobs", "ref_logprobs"]),
        ):
            assert methods[name]["required_columns"] == columns
        assert components["reward weighted"]["required_columns"] == []
        assert components["reward encore"]["required_columns"] == ["reward_heads"]
        assert components["loss grpo"]["required_columns"] == []

    def test_where_a_parameter_changes_them(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, components = self.tables(capsys)
        changed = {name: row["required_columns_with"] for name, row in components.items()}
        assert changed["advantage asr"] == {
            "source=entropy": ["entropies"],
            "source=reward_model": ["token_scores"],
            "segmentation=entropy_cutoff": ["entropies", "old_logprobs", "ref_logprobs"],
            "segmentation=stored": ["old_logprobs", "ref_logprobs", "segment_ids"],
        }
        assert changed["reward weighted"] == {'weights={"HEAD": 1}': ["reward_heads"]}
        assert changed["weighting seed_grpo"] == {"estimator=discrete": ["cluster_id"]}
        assert changed["advantage gtpo"] == {}
        assert main(["methods"]) == 0
        text = capsys.readouterr().out
        assert "      with source=entropy: entropies\n" in text
        assert "kl_coefficient,\nwhich reads ref_logprobs" in text


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/nope.yaml", "no such file; give the params.yaml to read"),
        (str(EXAMPLES), "cannot be read: Is a directory"),
    ],
)
def test_check_names_its_own_argument(
    path: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", path]) == 2
    assert capsys.readouterr().err == f"entrograd check: error: {path}: {why}\n"
