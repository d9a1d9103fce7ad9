"""Scores of stored samples: by hand, at another confidence, and samples that cannot be scored."""

from __future__ import annotations

import logging
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from entrograd.errors import InputError
from entrograd.evaluate.params import ScoreParams
from entrograd.evaluate.score import score
from entrograd.pipeline import runner
from entrograd.storage.files import read_json
from entrograd.storage.tables import MANIFEST, shard_name, write_manifest, write_table
from helpers.paths import ROOT

SECTION = ScoreParams(bootstrap=200)
# Held-out problems and whether models a and b solved them; b - a: -1 0 1 1 1 0.
SOLVED = {
    "a": {"id1": 1, "id2": 1, "id4": 0, "id5": 0, "id6": 0, "id7": 0},
    "b": {"id1": 0, "id2": 1, "id4": 1, "id5": 1, "id6": 1, "id7": 0},
}
GREEDY = {"max_new_tokens": 4, "stop": ["\n"], "temperature": 0.0}
SETTING = {
    "list_sha256": "c0ffee",
    "prompt": None,
    "sampling": GREEDY,
    "seed": 5,
    "dtype": "float32",
    "grader": "math-verify 0.9.0",
    "extraction": ["boxed", "last"],
}


def row(model: str, benchmark: str, problem: str, index: int, reward: float) -> dict[str, Any]:
    return {
        "model": model,
        "benchmark": benchmark,
        "problem_id": problem,
        "sample_index": index,
        "problem": problem,
        "answers": ["4"],
        "completion_text": "4",
        "answer": "4",
        "extraction_rule": "last",
        "reward": float(reward),
        "reward_status": "ok",
        "finish_reason": "stop",
    }


class Folder:
    """A folder of samples, and where its scores go."""

    def __init__(self, place: Path) -> None:
        self.samples = place / "samples"
        self.summary, self.benchmarks = place / "summary.json", place / "benchmarks.json"

    def add(
        self,
        index: int,
        model: str,
        rewards: Mapping[str, float | list[float]],
        benchmark: str = "heldout",
        /,
        **metadata: Any,
    ) -> None:
        """Write a shard: a reward, or several, of each problem."""
        each = {key: r if isinstance(r, list) else [r] for key, r in rewards.items()}
        rows = [
            row(model, benchmark, problem, number, reward)
            for problem, found in each.items()
            for number, reward in enumerate(found)
        ]
        origin = {
            "model": model,
            "benchmark": benchmark,
            "policy_version": f"weights of {model}",
            "chat_template_sha256": None,
            "problems": len(each),
            "n": len(next(iter(each.values()))),
            **SETTING,
            **metadata,
        }
        told = {key: value for key, value in origin.items() if value != "absent"}
        write_table(self.samples / shard_name(index), rows, "samples", **told)

    def score(self, section: ScoreParams = SECTION) -> str:
        if self.samples.exists():
            write_manifest(self.samples)
        return score(section, self.samples, self.summary, self.benchmarks)

    def refused(self) -> str:
        """The error, its folder left out; nothing is written."""
        with pytest.raises(InputError) as error:
            self.score()
        assert not self.summary.exists()
        assert not self.benchmarks.exists()
        return str(error.value).replace(f"{self.samples}/", "")


@pytest.fixture
def empty(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def folder(empty: Folder) -> Folder:
    """Models a and b on the held-out problems."""
    for index, (model, solved) in enumerate(SOLVED.items()):
        empty.add(index, model, solved)
    return empty


class TestScores:
    def test_by_hand(self, folder: Folder) -> None:
        assert folder.score() == "heldout, 6 problems: a 33.3 %, b 66.7 %"
        summary = read_json(folder.summary)
        assert list(summary) == ["a", "b", "b_minus_a"]
        # Wilson, k = 2, n = 6, z^2 = 3.841459: centre (1/3 + .320122) / 1.640243 = .398393,
        # half 1.959964 sqrt(.037037 + .026677) / 1.640243 = .301618
        assert summary["a"] == {
            "n": 6,
            "accuracy": pytest.approx(1 / 3),
            "ci_low": pytest.approx(0.096775, abs=2e-5),
            "ci_high": pytest.approx(0.700011, abs=2e-5),
        }
        assert summary["b"]["accuracy"] == pytest.approx(2 / 3)
        assert set(summary["b_minus_a"]) == {"diff", "ci_low", "ci_high"}
        assert summary["b_minus_a"]["diff"] == pytest.approx(1 / 3)
        assert -1 < summary["b_minus_a"]["ci_low"] < 1 / 3 < summary["b_minus_a"]["ci_high"] <= 1
        assert read_json(folder.benchmarks) == {}

    def test_the_first_shards_model_is_compared_with(self, empty: Folder) -> None:
        for index, model in enumerate(("b", "a")):
            empty.add(index, model, SOLVED[model])
        assert empty.score() == "heldout, 6 problems: b 66.7 %, a 33.3 %"
        assert read_json(empty.summary)["a_minus_b"]["diff"] == pytest.approx(-1 / 3)

    def test_a_benchmarks_entry(self, empty: Folder) -> None:
        sampling = {**GREEDY, "temperature": 0.6}
        setting = {"sampling": sampling, "prompt": {"style": "chat"}}
        empty.add(0, "a", {"p0": [1, 0], "p1": [0, 0]}, "list", **setting)
        empty.add(1, "b", {"p0": [1, 1], "p1": [1, 0]}, "list", **setting)
        assert empty.score() == "list, 2 problems: a 25.0 %, b 75.0 %"
        assert read_json(empty.summary) == {}
        entry = read_json(empty.benchmarks)["list"]
        for name, accuracy in {"a": 0.25, "b": 0.75}.items():
            model = entry["models"][name]
            # resampling two problems of means m and m' gives m, m' or their mean
            assert (model["accuracy"], model["ci_high"] - model["ci_low"]) == (accuracy, 0.5)
            assert model["reward_status"] == {"ok": 4}
            assert model["policy_version"] == f"weights of {name}"
            assert model["chat_template_sha256"] is None
        assert entry["differences"] == {"b_minus_a": {"diff": 0.5, "ci_low": 0.5, "ci_high": 0.5}}
        rest = {key: entry[key] for key in set(entry) - {"models", "differences"}}
        assert rest == {
            **{key: value for key, value in SETTING.items() if key != "sampling"},
            **sampling,
            **{"prompt": {"style": "chat"}, "problems": 2, "n": 2},
            **{"bootstrap": 200, "confidence": 0.95},
        }

    def test_the_held_out_split_is_told_first_wherever_it_stands(self, folder: Folder) -> None:
        for index, model in enumerate(SOLVED):
            folder.add(index, model, {"p0": 1, "p1": 0}, "list")
            folder.add(index + 2, model, SOLVED[model])
        assert folder.score() == "heldout, 6 problems: a 33.3 %, b 66.7 %, and 1 more"
        assert list(read_json(folder.benchmarks)) == ["list"]

    def test_equal_differences_are_warned_about(
        self, folder: Folder, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, logger="entrograd"):
            folder.score()
            assert "differences are equal" not in caplog.text
            folder.add(0, "a", dict.fromkeys(SOLVED["a"], 0))
            folder.add(1, "b", dict.fromkeys(SOLVED["b"], 1))
            folder.score()
        assert read_json(folder.summary)["b_minus_a"] == {"diff": 1, "ci_low": 1, "ci_high": 1}
        assert "b - a on heldout: all 6 differences are equal" in caplog.text

    def test_pairs_are_of_one_problem_whatever_the_order_of_rows(self, folder: Folder) -> None:
        folder.score()
        before = folder.summary.read_bytes()
        folder.add(1, "b", dict(reversed(SOLVED["b"].items())))
        folder.score()
        assert folder.summary.read_bytes() == before

    def test_another_confidence_changes_intervals_alone(self, folder: Folder) -> None:
        folder.score()
        wide = read_json(folder.summary)
        folder.score(ScoreParams(bootstrap=200, confidence=0.5))
        narrow = read_json(folder.summary)
        for name, value in {"a": "accuracy", "b": "accuracy", "b_minus_a": "diff"}.items():
            assert narrow[name][value] == wide[name][value]
            assert wide[name]["ci_low"] < narrow[name]["ci_low"]
            assert narrow[name]["ci_high"] < wide[name]["ci_high"]

    def test_the_seed_draws_the_problems(self, folder: Folder) -> None:
        found = []
        for seed in (0, 1, 0):
            folder.score(ScoreParams(bootstrap=20, confidence=0.5, seed=seed))
            found.append(folder.summary.read_bytes())
        assert found[0] == found[2] != found[1]


class TestBadInput:
    def test_a_folder_without_shards(self, empty: Folder) -> None:
        empty.samples.mkdir()
        assert empty.refused().endswith("samples: no shards; run stage evaluate again")
        (empty.samples / MANIFEST).unlink()
        with pytest.raises(InputError, match=r"samples: no \.manifest\.json and no \*\.parquet"):
            score(SECTION, empty.samples, empty.summary, empty.benchmarks)

    def test_a_shard_without_metadata(self, folder: Folder) -> None:
        file = folder.samples / shard_name(1)
        write_table(file, [row("b", "heldout", "id1", 0, 1)], "samples")
        assert folder.refused() == (
            "shard-00001.parquet: its metadata lacks model, benchmark, policy_version, "
            "chat_template_sha256, list_sha256, problems, prompt, n, sampling, seed, dtype, "
            "grader, extraction; run stage evaluate again"
        )

    @pytest.mark.parametrize("key", ["n", "prompt", "extraction"])
    def test_metadata_that_lacks_something(self, folder: Folder, key: str) -> None:
        folder.add(1, "b", SOLVED["b"], **{key: "absent"})
        assert f"shard-00001.parquet: its metadata lacks {key}; run " in folder.refused()

    @pytest.mark.parametrize("wrong", [{"problems": 7}, {"n": 2}, {"model": "c"}])
    def test_rows_that_are_not_what_the_metadata_says(
        self, folder: Folder, wrong: dict[str, Any]
    ) -> None:
        folder.add(1, "b", SOLVED["b"], **wrong)
        said = {"n": 1, "problems": 6, "model": "b", **wrong}
        assert folder.refused() == (
            f"shard-00001.parquet: its rows are not what its metadata says, {said['n']} samples of "
            f"each of {said['problems']} problems by {said['model']} on heldout; run stage "
            "evaluate again"
        )

    def test_a_problem_that_is_there_twice(self, folder: Folder) -> None:
        folder.add(1, "b", {**SOLVED["b"], "id7": [0, 0]}, n=1)
        assert "its rows are not what its metadata says" in folder.refused()

    def test_two_shards_of_a_model_and_benchmark(self, folder: Folder) -> None:
        folder.add(2, "a", SOLVED["a"])
        assert folder.refused() == (
            "shard-00002.parquet: model a on heldout, as shard-00000.parquet; remove one of the two"
        )

    def test_a_model_that_was_not_evaluated_on_all(self, folder: Folder) -> None:
        folder.add(2, "a", {"p0": 1}, "list")
        assert "samples: no shard of model b on list; run stage evaluate" in folder.refused()

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *(("list_sha256", "decaf"), ("seed", 6), ("dtype", "bfloat16")),
            *(("sampling", {**GREEDY, "max_new_tokens": 8}), ("prompt", {"style": "chat"})),
            *(("grader", "math-verify 1"), ("extraction", ["last"])),
        ],
    )
    def test_models_that_were_evaluated_differently(
        self, folder: Folder, key: str, value: Any
    ) -> None:
        folder.add(1, "b", SOLVED["b"], **{key: value})
        assert folder.refused() == (
            f"shard-00001.parquet: {key} of heldout is {value}, in shard-00000.parquet it is "
            f"{SETTING[key]}; run stage evaluate for all models together"
        )

    def test_other_problems(self, folder: Folder) -> None:
        solved = {("id0" if key == "id1" else key): value for key, value in SOLVED["b"].items()}
        folder.add(1, "b", solved)
        assert folder.refused() == (
            "shard-00001.parquet: other problems of heldout than in shard-00000.parquet (id0 is in "
            "one of them alone); run stage evaluate for all models together"
        )
        folder.add(1, "b", dict(list(SOLVED["b"].items())[:5]))
        assert "problems of heldout is 5, in shard-00000.parquet it is 6" in folder.refused()


class TestStage:
    def run(self, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["score.py", *arguments])
        monkeypatch.setattr(runner, "end_with_parent", lambda _: None)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "stages" / "score.py"), run_name="__main__")
        return int(str(ended.value.code))

    @pytest.fixture(autouse=True)
    def here(self, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write_manifest(folder.samples)
        (tmp_path / "params.yaml").write_text("score: {confidence: 0.9}\n")

    def test_it_reads_samples_and_its_section_alone(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(monkeypatch, "--samples", "samples") == 0
        said = capsys.readouterr().out
        assert said.startswith("score: heldout, 6 problems: a 33.3 %, b 66.7 % (")
        assert list(read_json(tmp_path / "results" / "summary.json")) == ["a", "b", "b_minus_a"]
        manifest = read_json(tmp_path / "results" / "summary.json.run.json")
        assert (manifest["stage"], set(manifest["inputs"])) == ("score", {"samples"})
        assert manifest["params"] == {"score": {"confidence": 0.9, "bootstrap": 10000, "seed": 0}}

    def test_a_changed_shard_is_named(
        self, folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder.add(1, "b", SOLVED["a"])
        assert self.run(monkeypatch, "--samples", "samples") == 2
        said = capsys.readouterr().err
        assert "score: error: samples/shard-00001.parquet: absent or changed since" in said
        assert not Path("results/summary.json").exists()
