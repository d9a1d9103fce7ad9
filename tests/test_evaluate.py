"""Evaluation on the tiny model: what is sampled and told of it, resume, pins, the stage."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from entrograd.data.params import FileSource, PromptFormat
from entrograd.data.prompt import render
from entrograd.errors import InputError
from entrograd.evaluate import evaluate as module
from entrograd.evaluate.benchmarks import benchmark_task, heldout, list_hash
from entrograd.evaluate.evaluate import evaluate
from entrograd.evaluate.params import Benchmark, EvaluateParams, ScoreParams
from entrograd.evaluate.score import score
from entrograd.models.load import load_model, policy_version
from entrograd.pipeline import runner
from entrograd.pipeline.sections import Params
from entrograd.rewards.params import GraderParams
from entrograd.rollout.engine import Request, Sampled
from entrograd.rollout.params import Sampling
from entrograd.storage.files import read_json
from entrograd.storage.hashing import sha256, text_hash
from entrograd.storage.tables import (
    provenance,
    read_table,
    shard_files,
    shard_name,
    write_table,
)
from helpers.tiny_model import CHAT_TEMPLATE

FORMAT = PromptFormat(style="few_shot", template="{problem} = {answer}\n")
ROOT = Path(__file__).parent.parent


@pytest.fixture
def models(tiny_model: Path) -> dict[str, Path]:
    return {"a": tiny_model, "b": tiny_model}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Six held-out rows among two for training."""
    rows = [
        {
            "prompt_id": f"id{i}",
            "source": "made up",
            "split": "train" if i in (0, 3) else "heldout",
            "problem": f"{i} + {i}",
            "answers": [str(2 * i)],
            "level": None,
            **render(f"{i} + {i}", FORMAT),
        }
        for i in range(8)
    ]
    write_table(tmp_path / "prompts.parquet", rows, "prompts")
    return tmp_path / "prompts.parquet"


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A benchmark of three problems, one with two accepted answers."""
    rows: list[dict[str, Any]] = [
        {"problem": "1 + 1", "answer": "2"},
        {"problem": "2 + 2", "answer": ["4", "four"]},
        {"problem": "3 + 3", "answer": "6"},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "list.jsonl"


LIST = [("1 + 1", ["2"]), ("2 + 2", ["4", "four"]), ("3 + 3", ["6"])]


def benchmark(path: Path, **more: Any) -> Benchmark:
    source = FileSource(kind="file", path=str(path))
    sampling = Sampling(temperature=1.0, max_new_tokens=4)
    given: dict[str, Any] = {"name": "list", "n": 2, "sampling": sampling, "prompt": FORMAT}
    return Benchmark(source=source, **{**given, **more})


def section(**more: Any) -> EvaluateParams:
    given: dict[str, Any] = {
        "max_new_tokens": 4,
        "dtype": "float32",
        "device": "cpu",
        "grader": GraderParams(workers=1),
    }
    return EvaluateParams(**{**given, **more})


class Outputs:
    """Where one run of evaluate and score writes."""

    def __init__(self, folder: Path) -> None:
        self.samples, self.resume = folder / "samples", folder / "resume"
        self.summary, self.benchmarks = folder / "summary.json", folder / "benchmarks.json"

    def run(self, chosen: EvaluateParams, models: dict[str, Path], prompts: Any) -> str:
        return evaluate(chosen, models, prompts, samples=self.samples, resume=self.resume)

    def score(self) -> str:
        return score(ScoreParams(bootstrap=200), self.samples, self.summary, self.benchmarks)

    def rows(self) -> list[dict[str, Any]]:
        return read_table(self.samples, "samples").to_pylist()


@pytest.fixture
def out(tmp_path: Path) -> Outputs:
    return Outputs(tmp_path / "out")


class Scripted:
    """An engine that knows some answers: those of the problem ids its turn names."""

    knows: tuple[frozenset[str], ...] = (
        frozenset({"id1", "id2"}),
        frozenset({"id2", "id4", "id5", "id6"}),
    )
    turn = -1
    policy_version = "scripted"

    def __init__(self, *_: Any) -> None:
        Scripted.turn += 1

    @classmethod
    def replace(cls, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the real engine's place."""
        monkeypatch.setattr(module, "TransformersEngine", cls)
        monkeypatch.setattr(module, "load_model", lambda *_: None)
        monkeypatch.setattr(Scripted, "turn", -1)

    def generate(self, requests: Sequence[Request], *_: Any) -> list[Sampled]:
        """The double of the id's number where it is known, nothing to read for id7, else 1."""
        texts = {
            r.prompt_id: str(2 * int(r.prompt_id[2:]))
            if r.prompt_id in self.knows[self.turn]
            else "?" * (r.prompt_id == "id7") or "1"
            for r in requests
        }
        return [Sampled((1,), texts[r.prompt_id], (0.0,), "stop") for r in requests]


class TestSamples:
    def test_by_hand(
        self,
        models: dict[str, Path],
        prompts: Path,
        out: Outputs,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        Scripted.replace(monkeypatch)
        line = out.run(section(), models, prompts)
        # held out: id1 id2 id4 id5 id6 id7; a knows the first two, b knows id2 id4 id5 id6
        assert line == "12 completions sampled and graded: a, b on heldout (6 problems)"
        assert [(row["model"], row["problem_id"]) for row in out.rows() if row["reward"] == 1] == [
            *(("a", f"id{i}") for i in (1, 2)),
            *(("b", f"id{i}") for i in (2, 4, 5, 6)),
        ]
        assert out.score() == "heldout, 6 problems: a 33.3 %, b 66.7 %"
        last = out.rows()[-1]
        assert (last["problem_id"], last["answer"], last["reward_status"]) == (
            "id7",
            None,
            "no_answer",
        )
        assert read_json(out.benchmarks) == {}

    def test_the_first_problems_in_table_order(
        self, models: dict[str, Path], prompts: Path, out: Outputs
    ) -> None:
        out.run(section(heldout_problems=3), {"a": models["a"]}, prompts)
        assert [row["problem_id"] for row in out.rows()] == ["id1", "id2", "id4"]
        out.score()
        assert list(read_json(out.summary)) == ["a"]

    def test_benchmarks_alone(self, models: dict[str, Path], listed: Path, out: Outputs) -> None:
        line = out.run(section(benchmarks=[benchmark(listed)], seed=5), models, None)
        assert line == "12 completions sampled and graded: a, b on list (3 problems)"
        assert out.score().startswith("list, 3 problems: a ")
        assert read_json(out.summary) == {}
        entry = read_json(out.benchmarks)["list"]
        assert (entry["problems"], entry["n"], entry["temperature"]) == (3, 2, 1.0)
        assert entry["list_sha256"] == list_hash(LIST)
        assert entry["grader"].startswith("math-verify ")
        rule = {key: entry[key] for key in Sampling.model_fields}
        assert Sampling(**rule) == benchmark(listed).sampling
        assert entry["prompt"] == FORMAT.model_dump()
        assert (entry["seed"], entry["dtype"]) == (5, "float32")
        assert entry["extraction"] == GraderParams().extraction
        assert (entry["bootstrap"], entry["confidence"]) == (200, 0.95)
        weights = policy_version(load_model(models["a"], "float32", "cpu"))
        for name in models:
            assert entry["models"][name]["policy_version"] == weights
            assert entry["models"][name]["chat_template_sha256"] == text_hash(CHAT_TEMPLATE)
        assert list(entry["differences"]) == ["b_minus_a"]
        rows = out.rows()
        assert [(r["problem"], r["sample_index"]) for r in rows if r["model"] == "b"] == [
            (problem, index) for problem, _ in LIST for index in (0, 1)
        ]
        for name in models:
            rewards = [row["reward"] for row in rows if row["model"] == name]
            assert entry["models"][name]["accuracy"] == pytest.approx(sum(rewards) / 6)
            assert sum(entry["models"][name]["reward_status"].values()) == 6

    def test_one_shard_a_model_and_task(
        self,
        models: dict[str, Path],
        prompts: Path,
        listed: Path,
        out: Outputs,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        Scripted.replace(monkeypatch)
        out.run(section(benchmarks=[benchmark(listed)]), models, prompts)
        shards = [pq.read_table(file).to_pylist() for file in shard_files(out.samples)]
        assert [(rows[0]["model"], rows[0]["benchmark"], len(rows)) for rows in shards] == [
            ("a", "heldout", 6),
            ("a", "list", 6),
            ("b", "heldout", 6),
            ("b", "list", 6),
        ]
        kept = ("problems", "n", "seed", "dtype", "extraction")
        told: list[Any] = [provenance(file) for file in shard_files(out.samples)]
        assert [(o["model"], o["benchmark"], *(o[key] for key in kept)) for o in told] == [
            (model, *task, 0, "float32", GraderParams().extraction)
            for model in models
            for task in (("heldout", 6, 1), ("list", 3, 2))
        ]
        assert [o["prompt"] for o in told] == [None, FORMAT.model_dump()] * 2
        assert told[1]["sampling"] == benchmark(listed).sampling.model_dump()

    def test_two_runs_give_equal_bytes(
        self, models: dict[str, Path], prompts: Path, listed: Path, tmp_path: Path
    ) -> None:
        first, second = Outputs(tmp_path / "one"), Outputs(tmp_path / "two")
        for run in (first, second):
            run.run(section(benchmarks=[benchmark(listed)]), {"a": models["a"]}, prompts)
            run.score()
        assert sha256(first.samples) == sha256(second.samples)
        assert first.summary.read_bytes() == second.summary.read_bytes()
        assert first.benchmarks.read_bytes() == second.benchmarks.read_bytes()


class TestResume:
    @pytest.fixture
    def generated(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many completions each call of the engine was asked for."""
        calls: list[int] = []

        def counted(_: Any, requests: Sequence[Request], *_rest: Any) -> list[Sampled]:
            calls.append(len(requests))
            return [Sampled((1,), f"{len(r.prompt_id)}", (0.0,), "stop") for r in requests]

        Scripted.replace(monkeypatch)
        monkeypatch.setattr(Scripted, "generate", counted)
        return calls

    def test_finished_shards_are_not_sampled_again(
        self,
        models: dict[str, Path],
        prompts: Path,
        out: Outputs,
        tmp_path: Path,
        generated: list[int],
    ) -> None:
        whole = Outputs(tmp_path / "whole")
        whole.run(section(), models, prompts)
        assert generated == [6, 6]
        out.resume.mkdir(parents=True)
        shard = whole.resume / shard_name(0)
        (out.resume / shard_name(0)).write_bytes(shard.read_bytes())
        out.run(section(), models, prompts)
        assert generated == [6, 6, 6]
        assert sha256(out.samples) == sha256(whole.samples)

    def test_a_shard_of_another_list_is_sampled_again(
        self, models: dict[str, Path], listed: Path, out: Outputs, generated: list[int]
    ) -> None:
        chosen = section(benchmarks=[benchmark(listed)])
        out.run(chosen, {"a": models["a"]}, None)
        listed.write_text(listed.read_text().replace("3 + 3", "3 + 4"))
        out.run(chosen, {"a": models["a"]}, None)
        assert generated == [6, 6]
        assert out.rows()[-1]["problem"] == "3 + 4"


class TestBadInput:
    def test_nothing_to_evaluate(self, models: dict[str, Path], out: Outputs) -> None:
        with pytest.raises(InputError, match="nothing to evaluate"):
            out.run(section(), models, None)

    def test_too_few_heldout_rows(self, prompts: Path) -> None:
        with pytest.raises(InputError, match=r"6 rows with split heldout, 7 wanted"):
            heldout(prompts, section(heldout_problems=7))

    def test_a_list_that_is_not_the_pinned_one(self, listed: Path) -> None:
        pinned = list_hash(LIST)
        assert benchmark_task(benchmark(listed, sha256=pinned)).list_sha256 == pinned
        with pytest.raises(InputError, match=rf"{pinned}, sha256 pins {'0' * 64}"):
            benchmark_task(benchmark(listed, sha256="0" * 64))

    def test_order_and_answers_are_part_of_the_list(self) -> None:
        assert len({list_hash(LIST), list_hash(LIST[::-1]), list_hash([*LIST[:2]])}) == 3
        assert list_hash([("a", ["b", "c"])]) != list_hash([("a", ["b"]), ("c", [])])

    def test_a_row_without_answer_is_named(self, listed: Path) -> None:
        listed.write_text(listed.read_text() + '{"problem": "5 + 5"}\n')
        with pytest.raises(InputError, match=r"list: list\.jsonl row 4: missing answer"):
            benchmark_task(benchmark(listed))

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"absent\.jsonl"):
            benchmark_task(benchmark(tmp_path / "absent.jsonl"))

    def test_a_benchmark_may_not_be_called_heldout(self, listed: Path) -> None:
        with pytest.raises(InputError, match="choose another"):
            benchmark_task(benchmark(listed, name="heldout"))

    def test_a_prompt_longer_than_the_context_is_named(
        self, models: dict[str, Path], prompts: Path, out: Outputs
    ) -> None:
        with pytest.raises(InputError, match=r"id1: .* context of 256"):
            out.run(section(max_new_tokens=256), models, prompts)
        assert not out.samples.exists()

    def test_a_folder_without_model_is_named(
        self, prompts: Path, out: Outputs, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=r"no config\.json"):
            out.run(section(), {"a": tmp_path}, prompts)


@pytest.mark.parametrize(
    ("name", "rows"),
    [("aime24", 30), ("amc23", 83), ("math500", 500), ("minerva", 272), ("olympiadbench", 675)],
)
def test_public_benchmarks_are_read_whole(shared_data: Path, name: str, rows: int) -> None:
    source = FileSource(kind="file", path=str(shared_data / "benchmarks" / f"{name}.jsonl"))
    task = benchmark_task(Benchmark(name=name, source=source))
    assert len(task.problems) == rows
    assert all(p.answers and p.prompt["messages"][-1]["content"] for p in task.problems)
    first = FileSource(kind="file", path=source.path, limit=5)
    assert benchmark_task(Benchmark(name=name, source=first)).problems == task.problems[:5]


class TestStage:
    def test_a_users_own_model_on_a_benchmark_alone(
        self,
        models: dict[str, Path],
        listed: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        sections: dict[str, Any] = {name: {} for name in Params.model_fields}
        sections |= {
            "base_model": {"reference": "path:none"},
            "prepare": {"sources": [{"kind": "file", "path": "none.jsonl"}]},
            "method": {"name": "grpo"},
            "evaluate": section(benchmarks=[benchmark(listed)]).model_dump(mode="json"),
        }
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(sections))
        arguments = ["evaluate.py", "--model", f"mine={models['b']}", "--prompts", ""]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(runner, "end_with_parent", lambda _: None)
        for name, given in {"evaluate": arguments, "score": ["score.py"]}.items():
            monkeypatch.setattr(sys, "argv", given)
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / "stages" / f"{name}.py"), run_name="__main__")
            assert ended.value.code == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith("evaluate: 6 completions sampled and graded: mine on list (3 ")
        assert said[1].startswith("score: list, 3 problems: mine ")
        entry = read_json(tmp_path / "results" / "benchmarks.json")["list"]
        assert list(entry["models"]) == ["mine"]
        manifest = read_json(tmp_path / "data" / "samples.run.json")
        assert set(manifest["inputs"]) == {str(models["b"]), str(listed)}  # the list is an input
