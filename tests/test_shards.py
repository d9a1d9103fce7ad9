"""Shards here, in processes and through a local Ray: the same bytes, whoever dies."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from entrograd.annotate import annotate as annotate_module
from entrograd.annotate import completions
from entrograd.annotate.annotate import annotate
from entrograd.annotate.params import AnnotateParams
from entrograd.errors import InputError, Unfinished
from entrograd.params import check
from entrograd.pipeline import shards
from entrograd.pipeline.params import Executor
from entrograd.pipeline.shards import chosen_shards, map_shards
from entrograd.rewards.params import Head
from entrograd.rollout import rollout as rollout_module
from entrograd.rollout.params import RolloutParams, Sampling
from entrograd.rollout.rollout import rollout
from entrograd.storage.hashing import sha256
from entrograd.storage.tables import read_table, shard_files, write_table
from helpers.shard_work import dying_annotate, dying_rollout, worker
from helpers.tables import prompts_table

KINDS = ["processes", "ray"]


@pytest.fixture(autouse=True)
def found_by_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


class TestMap:
    def test_here(self, tmp_path: Path) -> None:
        got = list(map_shards(Executor(), worker, (tmp_path, -1, 0), [4, 0]))
        assert [result for _, result in got] == [
            [n, n * n, torch.get_num_threads()] for n in (4, 0)
        ]
        assert list(map_shards(Executor(), worker, (tmp_path, -1, 0), [])) == []

    def test_a_dead_workers_shard_is_done_again_with_the_callers_threads(
        self, tmp_path: Path
    ) -> None:
        executor = Executor(kind="processes")
        got = sorted(map_shards(executor, worker, (tmp_path, 2, 1), [0, 1, 2, 3]))
        assert got == [(n, [n, n * n, torch.get_num_threads()]) for n in range(4)]
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_shard_that_kills_its_workers_ends_the_run(self, tmp_path: Path) -> None:
        executor = Executor(kind="processes", workers=1)
        with pytest.raises(InputError, match="shard 2: 3 workers died at it"):
            list(map_shards(executor, worker, (tmp_path, 2, 99), [2, 3]))

    @pytest.mark.parametrize("kind", ["inline", *KINDS])
    def test_errors_of_the_work_are_raised_as_they_are(self, kind: str, tmp_path: Path) -> None:
        executor = check(Executor, {"kind": kind, "workers": 1}, "x")
        with pytest.raises(InputError, match="prompt p99: it has no tokens"):
            list(map_shards(executor, worker, (tmp_path, -1, 0), [99]))

    def test_a_ray_cluster_that_is_not_there(self, tmp_path: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        executor = Executor(kind="ray", address=address)
        with pytest.raises(InputError, match=f"no cluster at {address}.*ray start --head"):
            list(map_shards(executor, worker, (tmp_path, -1, 0), [0]))

    def test_a_machine_without_the_inputs_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shards.Path, "cwd", lambda: tmp_path / "elsewhere")
        executor = Executor(kind="ray", workers=1)
        with pytest.raises(InputError, match=r"has no folder .*/elsewhere; mount the inputs"):
            list(map_shards(executor, worker, (tmp_path, -1, 0), [0]))

    def test_an_address_is_rays(self) -> None:
        with pytest.raises(InputError, match="address belongs to kind ray"):
            check(Executor, {"kind": "processes", "address": "head:6379"}, "rollout.executor")


class TestChosen:
    def test_ranges(self) -> None:
        assert chosen_shards(None, 3) == [0, 1, 2]
        assert chosen_shards("3-5, 0,4", 6) == [0, 3, 4, 5]

    @pytest.mark.parametrize("text", ["", "x", "2-1", "3-6", "6", "-1", "1-"])
    def test_bad_ones_say_what_is_allowed(self, text: str) -> None:
        with pytest.raises(InputError, match="from 0 to 5"):
            chosen_shards(text, 6)


class TestRollout:
    def run(
        self, model: Path, folder: Path, name: str, part: str | None = None, **executor: Any
    ) -> str:
        params = RolloutParams(
            group_size=2,
            shard_prompts=2,
            sampling=Sampling(max_new_tokens=4),
            dtype="float32",
            executor=check(Executor, executor, "x"),
        )
        prompts = prompts_table(folder / "prompts.parquet", 7)
        work = folder / f"work-{name}"
        work.mkdir(exist_ok=True)
        rollout(params, model, prompts, folder / name, work, part)
        return sha256(folder / name)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_bytes_do_not_depend_on_the_executor_nor_on_a_killed_worker(
        self, kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        want = self.run(tiny_model, tmp_path, "inline")
        monkeypatch.setenv("ENTROGRAD_TEST_MARK", str(tmp_path / "died"))
        monkeypatch.setattr(rollout_module, "shard_worker", dying_rollout)
        assert self.run(tiny_model, tmp_path, kind, kind=kind) == want
        assert (tmp_path / "died").exists()
        assert len(shard_files(tmp_path / kind)) == 4

    def test_parts_run_alone_and_the_last_assembles(self, tiny_model: Path, tmp_path: Path) -> None:
        want = self.run(tiny_model, tmp_path, "whole")
        with pytest.raises(Unfinished, match="2 shards computed, 2 of 4 left"):
            self.run(tiny_model, tmp_path, "parts", "2-3")
        assert not (tmp_path / "parts").exists()
        with pytest.raises(Unfinished, match="0 shards computed, 2 of 4 left"):
            self.run(tiny_model, tmp_path, "parts", "3")
        assert self.run(tiny_model, tmp_path, "parts", "0-1") == want

    def test_executor_is_no_part_of_the_result(self) -> None:
        assert "executor" not in RolloutParams().model_dump()


class TestAnnotate:
    """Rows of seven prompts in one file, two groups a shard; in the current folder with a head of
    the user's own beside them."""

    @pytest.fixture(autouse=True)
    def small_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(completions, "PIECE_ROWS", 4)

    def run(
        self, model: Path, folder: Path, name: str, part: str | None = None, **executor: Any
    ) -> dict[str, str]:
        prompts = prompts_table(folder / "prompts.parquet", 7)
        ids = read_table(prompts, "prompts")["prompt_id"].to_pylist()
        rows = [
            {
                "prompt_id": prompt,
                "sample_index": sample,
                "completion_text": f"{place} + {sample} = {place + sample}",
            }
            for place, prompt in enumerate(ids[:7])
            for sample in range(2)
        ]
        rollouts, out = folder / "rollouts.parquet", folder / name
        write_table(rollouts, rows, "completions")
        work = folder / f"work-{name}"
        work.mkdir(exist_ok=True)
        annotate(
            AnnotateParams(
                dtype="float32",
                device="cpu",
                heads={"own": Head(function="own_head:rate")} if folder == Path() else {},
                executor=check(Executor, executor, "x"),
            ),
            prompts,
            rollouts,
            model,
            out / "annotated",
            out / "groups.parquet",
            out / "annotate.json",
            out / "reward_heads.json",
            work,
            part,
        )
        return {path.name: sha256(path) for path in sorted(out.iterdir())}

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_bytes_do_not_depend_on_the_executor_nor_on_a_killed_worker(
        self, kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "own_head.py").write_text("def rate(text):\n    return len(text) % 2\n")
        monkeypatch.chdir(tmp_path)
        want = self.run(tiny_model, Path(), "inline")
        assert len(want) == 4
        monkeypatch.setenv("ENTROGRAD_TEST_MARK", str(tmp_path / "died"))
        monkeypatch.setattr(annotate_module, "shard_worker", dying_annotate)
        assert self.run(tiny_model, Path(), kind, kind=kind) == want
        assert (tmp_path / "died").exists()
        assert len(shard_files(tmp_path / kind / "annotated")) == 4

    def test_parts_run_alone_and_the_last_assembles(self, tiny_model: Path, tmp_path: Path) -> None:
        want = self.run(tiny_model, tmp_path, "whole")
        with pytest.raises(Unfinished, match="2 shards computed, 2 of 4 left"):
            self.run(tiny_model, tmp_path, "parts", "2-3")
        assert not (tmp_path / "parts").exists()
        assert self.run(tiny_model, tmp_path, "parts", "0-1") == want
        with pytest.raises(InputError, match="from 0 to 3"):
            self.run(tiny_model, tmp_path, "other", "4")

    @pytest.mark.parametrize("kind", ["inline", "processes"])
    def test_an_error_names_the_file(self, kind: str, tiny_model: Path, tmp_path: Path) -> None:
        prompts = prompts_table(tmp_path / "prompts.parquet", 1)
        (name,) = read_table(prompts, "prompts")["prompt_id"].to_pylist()[:1]
        row = {"prompt_id": name, "completion_text": "12", "completion_ids": [10**6]}
        write_table(tmp_path / "rollouts.parquet", [row], "completions")
        out = tmp_path / "out"
        with pytest.raises(InputError, match=r"rollouts.parquet: .*token 1000000 is not in the vo"):
            annotate(
                AnnotateParams(device="cpu", executor=check(Executor, {"kind": kind}, "x")),
                prompts,
                tmp_path / "rollouts.parquet",
                tiny_model,
                out / "annotated",
                out / "groups.parquet",
                out / "annotate.json",
                out / "reward_heads.json",
                tmp_path / "work",
            )

    def test_executor_is_no_part_of_the_result(self) -> None:
        assert "executor" not in AnnotateParams().model_dump()
