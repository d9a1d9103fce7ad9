"""Reward heads: their ratings, users' own, and ENCORE's weights from annotate to the step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrograd.annotate.reward_weights import head_values, read_entropies, summarise_heads
from entrograd.cli.main import main
from entrograd.errors import InputError
from entrograd.rewards import heads
from entrograd.rewards.params import Head
from entrograd.storage.files import read_json, write_json
from entrograd.storage.tables import read_table, write_table
from entrograd.train.batch import examples
from entrograd.train.offline import train_offline
from entrograd.train.online import train_online
from helpers.annotation import SETTINGS, Files
from helpers.paths import SHIPPED
from helpers.tables import annotated_rows, groups
from helpers.training import pipeline_params

POINTS = {0.0, 0.25, 0.5, 0.75, 1.0}


def rating(name: str, text: str, **options: Any) -> float:
    return heads.load({name: Head(options=options)})[name](text)


class TestRatings:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (r"Adding gives \boxed{12}.", 1.0),
            ("12", 1.0),
            (r"\boxed{12}, no: \boxed{13}", 0.75),
            ("7 + 5 = 12, so the answer is 12.", 0.5),
            ("12\n9 + 1 = 10", 0.5),
            ("We have 7 and 5, in all 12 of them", 0.25),
            ("I do not know.\nSorry.", 0.0),
            ("", 0.0),
        ],
    )
    def test_format(self, text: str, expected: float) -> None:
        assert rating("format", text) == expected

    # 1 - (length - 10) / 40 to the nearest quarter: 19 -> .775, 25 -> .625 (half goes up)
    @pytest.mark.parametrize(
        ("length", "expected"),
        [(0, 1), (10, 1), (19, 0.75), (25, 0.75), (30, 0.5), (40, 0.25), (50, 0), (999, 0)],
    )
    def test_brevity(self, length: int, expected: float) -> None:
        assert rating("brevity", "x" * length, target=10, longest=50) == expected

    def test_repetition(self) -> None:
        # bigrams ab ba ab ba ab: 2 of 5 distinct, .4; three words have one trigram, 1 of 1
        assert rating("repetition", "a b A b a b", ngram=2) == 0.5
        assert rating("repetition", "a b c") == 1.0
        assert rating("repetition", "one") == 1.0
        assert rating("repetition", "go " * 50) == 0.0  # 1 of 48

    def test_language(self) -> None:
        assert rating("language", "the sum of 7 and π is x") == 1.0
        # 5 Latin letters of 10
        assert rating("language", "seven слово") == 0.5
        # 8 of 8 in one family; none of them Latin
        assert rating("language", "答えは十二です。") == 1.0
        assert rating("language", "答えは十二です。", script="latin") == 0.0
        assert rating("language", r"\frac{\sqrt{2}}{3} 所以答案") == 1.0
        assert rating("language", "7 + 5 = 12") == 1.0

    def test_steps(self) -> None:
        assert rating("steps", "First add 7. Then add 5.\n7 + 5 = 12\n12") == 0.75
        assert rating("steps", "1. Add.\n2. Carry.\n3. Check.\n4. Say it.\n5. Stop.") == 1.0
        assert rating("steps", "It is 3.5 apples", target=2) == 0.5
        assert rating("steps", "先算七加五。再算十二。", target=2) == 1.0
        assert rating("steps", "12") == 0.0

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(text=st.text(max_size=300), name=st.sampled_from(list(heads.HEADS)))
    def test_five_points_and_nothing_but_the_text(self, text: str, name: str) -> None:
        rate = heads.load({name: Head()})[name]
        first = rate(text)
        assert first in POINTS
        rate("something else in between")
        assert rate(text) == first


class TestUsersOwn:
    def test_a_function_beside_the_params(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "my_heads_a.py").write_text(
            "def polite(text, word='please'):\n    return float(word in text)\n"
        )
        monkeypatch.chdir(tmp_path)
        head = Head(function="my_heads_a:polite", options={"word": "thanks"})
        rate = heads.load({"polite": head})["polite"]
        assert (rate("thanks"), rate("please")) == (1.0, 0.0)
        # its file is an input of the stage
        assert SETTINGS.model_copy(update={"heads": {"p": head}}).files() == ["my_heads_a.py"]
        assert Head(function="math:sin").files() == []

    @pytest.mark.parametrize(
        ("name", "head", "message"),
        [
            ("frmat", {}, r"annotate\.heads\.frmat: no head of that name; there are format, brev"),
            ("a", {"function": "nowhere_at_all:f"}, r"heads\.a\.function: .*nowhere_at_all"),
            ("a", {"function": "math:nothing"}, r"heads\.a\.function: .*nothing"),
            ("a", {"function": "math:pi"}, "is not a function"),
            ("brevity", {"options": {"traget": 3}}, r"heads\.brevity: TypeError: .*traget"),
            ("brevity", {"options": {"target": 9, "longest": 3}}, r"target \(9\) must lie"),
            ("a", {"function": "builtins:len"}, None),
            ("a", {"function": "builtins:int"}, r"heads\.a: ValueError: invalid literal"),
        ],
    )
    def test_mistakes(self, name: str, head: dict[str, Any], message: str | None) -> None:
        if message is None:  # len("") is 0, len("two") is no rating
            rate = heads.load({name: Head(**head)})[name]
            with pytest.raises(InputError, match=r"in \[0, 1\] \(got 3 on 'two'\)"):
                rate("two")
            return
        with pytest.raises(InputError, match=message):
            heads.load({name: Head(**head)})


def rated(*ratings: tuple[float, float]) -> list[dict[str, Any]]:
    """The training test's rows with two heads."""
    rows = annotated_rows()
    for row, (a, b) in zip(rows, ratings, strict=True):
        row["reward_heads"] = [{"name": "format", "value": a}, {"name": "brevity", "value": b}]
    return rows


# format: 3 of 6 at 0, 3 at 1: ln 2. brevity: 2 of 6 at .5, 4 at 1: -(1/3 ln 1/3 + 2/3 ln 2/3)
RATED = rated((1, 1), (0, 1), (0, 0.5), (1, 1), (0, 0.5), (1, 1))
H = {"format": 0.6931472, "brevity": 0.6365142}


class TestWeights:
    def test_summary(self, tmp_path: Path) -> None:
        found = summarise_heads([RATED[:2], RATED[2:]])
        assert (found["completions"], found["tau"]) == (6, 2.0)
        assert found["log_base"] == math.e
        assert found["heads"]["format"]["ratings"] == {"0": 0.5, "1": 0.5}
        assert found["heads"]["brevity"]["ratings"] == pytest.approx({"0.5": 1 / 3, "1": 2 / 3})
        assert found["heads"]["brevity"]["mean"] == pytest.approx(5 / 6)
        first, second = (math.exp(-H[name] / 2) for name in H)
        for name, weight in (("format", first), ("brevity", second)):
            assert found["heads"][name]["entropy"] == pytest.approx(H[name], abs=1e-7)
            assert found["heads"][name]["weight"] == pytest.approx(weight / (first + second))
        write_json(tmp_path / "h.json", found)
        assert read_entropies(tmp_path / "h.json", 6) == pytest.approx(H, abs=1e-7)
        with pytest.raises(
            InputError, match=r"h\.json: measured on 6 completions, the table has 7"
        ):
            read_entropies(tmp_path / "h.json", 7)
        write_json(tmp_path / "other.json", {"completions": 3})
        with pytest.raises(InputError, match=r"other\.json: not the reward heads"):
            read_entropies(tmp_path / "other.json")

    def test_no_heads(self) -> None:
        assert summarise_heads([annotated_rows()])["heads"] == {}

    def test_rows_with_other_heads_are_named(self) -> None:
        rows = rated(*[(1, 1)] * 6)
        rows[4]["reward_heads"].reverse()
        with pytest.raises(InputError, match="t: prompt p1 sample 1 has the reward heads"):
            head_values(rows, "t")
        rows[4]["reward_heads"] = None
        with pytest.raises(InputError, match="p1 sample 1"):
            head_values(rows, "t")
        with pytest.raises(InputError, match=r"prompt p1 has the reward heads \[\], the first"):
            summarise_heads([rows[:4], rows[4:5]])

    def test_batch_columns(self) -> None:
        batch = examples(groups(RATED), torch.device("cpu")).batch
        assert batch.head_names == ("format", "brevity")
        assert batch.reward_heads is not None
        assert batch.reward_heads[2].tolist() == [0.0, 0.5]


class TestStages:
    def test_annotate_writes_ratings_and_weights(self, tiny_model: Path, tmp_path: Path) -> None:
        files = Files(tmp_path, tiny_model, shards=1)
        named = {"format": Head(), "short": Head(function="brevity", options={"longest": 401})}
        files.run(tmp_path / "r", settings=SETTINGS.model_copy(update={"heads": named}))
        rows = read_table(tmp_path / "out/annotated", "annotated").to_pylist()
        # "12\n", "13\n", "12.0\n7 + 5", "no\n": one line, the answer; an answer before more
        assert [row["reward_heads"][0]["value"] for row in rows[:4]] == [1.0, 1.0, 0.5, 1.0]
        assert [head["name"] for head in rows[0]["reward_heads"]] == ["format", "short"]
        stored = read_json(tmp_path / "out/reward_heads.json")
        assert stored == summarise_heads([rows])
        assert stored["heads"]["short"]["entropy"] == 0.0

    def test_no_heads_by_default(self, tiny_model: Path, tmp_path: Path) -> None:
        files = Files(tmp_path, tiny_model, shards=1)
        files.run(tmp_path / "r")
        rows = read_table(tmp_path / "out/annotated", "annotated").to_pylist()
        assert all(row["reward_heads"] is None for row in rows)
        assert read_json(tmp_path / "out/reward_heads.json")["heads"] == {}

    def train(self, tmp_path: Path, model: Path, method: dict[str, Any], heads_file: Any) -> Any:
        write_table(tmp_path / "t.parquet", RATED, "annotated")
        params = pipeline_params(method=method)
        train_offline(
            params.train_offline,
            params.method,
            model,
            tmp_path / "t.parquet",
            tmp_path / "out",
            tmp_path / "curve.csv",
            tmp_path / f"work-{heads_file is None}",
            reward_heads=heads_file,
        )
        return (tmp_path / "curve.csv").read_text().splitlines()

    def test_offline_encore_reads_the_stored_entropies(
        self, tiny_model: Path, tmp_path: Path
    ) -> None:
        write_json(tmp_path / "h.json", summarise_heads([RATED[:2], RATED[2:]]))
        read = self.train(tmp_path, tiny_model, {"name": "encore"}, tmp_path / "h.json")
        measured = self.train(tmp_path, tiny_model, {"name": "encore"}, None)
        assert read == measured
        row = dict(zip(read[0].split(","), map(float, read[1].split(",")), strict=True))
        # 1 / (1 + e^{(H_f - H_b) / 2}) with H_f - H_b = .0566330
        assert row["weight_format"] == pytest.approx(0.4929222, abs=1e-6)
        assert row["weight_format"] + row["weight_brevity"] == pytest.approx(1)

    def test_offline_without_heads_is_refused(self, tiny_model: Path, tmp_path: Path) -> None:
        write_table(tmp_path / "t.parquet", annotated_rows(), "annotated")
        params = pipeline_params(method={"name": "encore"})
        paths = [tiny_model, tmp_path / "t.parquet", *(tmp_path / n for n in ("o", "c.csv", "w"))]
        with pytest.raises(InputError, match="row 0: reward_heads is empty and method encore"):
            train_offline(params.train_offline, params.method, *paths)

    def test_weights_of_unknown_heads_are_refused_before_a_model_is_loaded(
        self, tmp_path: Path
    ) -> None:
        method = {"name": "weighted", "weighted": {"weights": {"reward": 1.0, "charm": 1.0}}}
        with pytest.raises(InputError, match=r"weighted\.weights\.charm: .*reward, format, brev"):
            self.train(tmp_path, tmp_path / "no model", method, None)

    def test_online_needs_heads_and_their_entropies_first(self, tmp_path: Path) -> None:
        nowhere = [tmp_path / name for name in "abcdef"]
        params = pipeline_params(method={"name": "encore"})
        with pytest.raises(InputError, match=r"annotate\.heads: method encore .*reward_heads"):
            train_online(params, *nowhere)
        params = pipeline_params(method={"name": "encore"}, annotate={"heads": {"format": {}}})
        with pytest.raises(InputError, match=r"encore\.entropies: .*\['format'\]"):
            train_online(params, *nowhere)

    def test_online_rounds_hold_ratings(self, tiny_model: Path, tmp_path: Path) -> None:
        prompts = [
            {
                "prompt_id": f"id{i}",
                "source": "s",
                "split": "train",
                "problem": f"{i}",
                "answers": ["7"],
                "prompt_text": f"{i} = ",
            }
            for i in range(2)
        ]
        write_table(tmp_path / "prompts.parquet", prompts, "prompts")
        params = pipeline_params(
            rollout={"group_size": 4, "sampling": {"max_new_tokens": 5}},
            annotate={"heads": {"format": {}, "brevity": {"options": {"target": 1, "longest": 6}}}},
            train_online={"rounds": 2, "prompts_per_round": 2},
            method={"name": "encore", "encore": {"entropies": {"format": 0.0, "brevity": 1.0}}},
        )
        (tmp_path / "work").mkdir()
        out = [tmp_path / name for name in ("model", "rounds", "curve.csv", "work")]
        train_online(params, tiny_model, tmp_path / "prompts.parquet", *out)
        rows = read_table(tmp_path / "rounds", "annotated").to_pylist()
        assert [head["name"] for head in rows[0]["reward_heads"]] == ["format", "brevity"]
        rates = heads.load(params.annotate.heads)
        for row in rows:
            ratings = {head["name"]: head["value"] for head in row["reward_heads"]}
            assert ratings == heads.ratings(rates, row["completion_text"])
        assert len({row["reward_heads"][0]["value"] for row in rows}) > 1
        assert "weight_brevity" in (tmp_path / "curve.csv").read_text()


def test_check_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = SHIPPED.read_text()
    file = tmp_path / "params.yaml"
    for old, new, message in (
        ("  name: gtpo\n", "  name: encore\n", "annotate.heads: method encore"),
        ("  name: gtpo\n", "  name: asr\n", "train_offline.reference: method asr"),
        ("  heads: {}", "  heads: {charm: {}}", "annotate.heads.charm"),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        assert main(["check", str(file)]) == 2
        assert message in capsys.readouterr().err
    heads_given = text.replace("  heads: {}", "  heads: {format: {}}")
    file.write_text(heads_given.replace("  name: gtpo\n", "  name: encore\n"))
    assert main(["check", str(file)]) == 0
