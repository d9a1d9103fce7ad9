"""Completions made elsewhere: pieces of whole groups, text alone, segments, other readers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrograd.annotate import completions
from entrograd.annotate.annotate import annotate
from entrograd.annotate.completions import PieceReader, Prompts, complete, plan
from entrograd.annotate.params import AnnotateParams, ChangeSegments, CutoffSegments
from entrograd.annotate.segments import segment_ids
from entrograd.errors import InputError
from entrograd.methods.params import MethodParams
from entrograd.models.load import load_tokenizer
from entrograd.storage.hashing import sha256
from entrograd.storage.schemas import SCHEMAS
from entrograd.storage.tables import read_table, shard_files, write_table
from entrograd.train.offline import train_offline
from entrograd.train.params import Optimizer, TrainOfflineParams

SETTINGS = AnnotateParams(dtype="float32", device="cpu")


def prompts_table(path: Path, names: list[str], **other: Any) -> Path:
    rows = [
        {
            "prompt_id": name,
            "source": "test",
            "split": "train",
            "problem": f"{name}?",
            "answers": ["12"],
            **({"prompt_text": f"{name}: 5 + 7 = "} | other),
        }
        for name in names
    ]
    write_table(path, rows, "prompts")
    return path


def write(path: Path, **columns: list[Any]) -> Path:
    """A table as another tool would write it: no schema, no metadata of ours."""
    pq.write_table(pa.table(columns), path)
    return path


def run(place: Path, prompts: Path, rollouts: Path, model: Path, **other: Any) -> Path:
    annotate(
        SETTINGS.model_copy(update=other),
        prompts,
        rollouts,
        model,
        place / "annotated",
        place / "groups.parquet",
        place / "annotate.json",
        place / "reward_heads.json",
        place / "resume",
    )
    return place / "annotated"


# --- pieces ----------------------------------------------------------------------------------


class TestPieces:
    def pieces(self, folder: Path, names: list[str]) -> list[tuple[int, list[str]]]:
        file = write(
            folder / "rows.parquet",
            prompt_id=names,
            completion_text=[str(i) for i in range(len(names))],
        )
        prompts = Prompts(prompts_table(folder / "prompts.parquet", sorted(set(names))))
        planned = plan([file], prompts)
        reader = PieceReader(planned)
        rows = [reader.read(number).to_pylist() for number in range(len(planned))]
        assert [len(part) for part in rows] == [piece.rows for piece in planned]
        return [
            (piece.rows, [row["prompt_id"] for row in part])
            for piece, part in zip(planned, rows, strict=True)
        ]

    def test_in_any_order(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(completions, "PIECE_ROWS", 2)
        monkeypatch.setattr(completions, "_READ_ROWS", 3)
        files = []
        for file, names in {"one": "aabbbc", "two": "ddeefff"}.items():
            texts = [f"{file} {row}" for row in range(len(names))]
            files.append(
                write(tmp_path / file, prompt_id=list(names), completion_text=texts)
            )  # fmt: skip
        prompts = prompts_table(tmp_path / "prompts.parquet", list("abcdef"))
        planned = plan(files, Prompts(prompts))
        want = [
            ["one 0", "one 1"],
            ["one 2", "one 3", "one 4"],
            ["one 5"],
            ["two 0", "two 1"],
            ["two 2", "two 3"],
            ["two 4", "two 5", "two 6"],
        ]
        reader = PieceReader(planned)
        for number in [0, 2, 3, 5, 5, 4, 1, 0, 5, 2, 1]:
            assert reader.read(number)["completion_text"].to_pylist() == want[number]

    def test_a_bad_row_is_named_by_its_place_in_the_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompts = Prompts(prompts_table(tmp_path / "prompts.parquet", ["a", "b"]))
        file = write(tmp_path / "r", prompt_id=["a", "a", "b"], completion_text=["", "", ""])
        monkeypatch.setattr(completions, "PIECE_ROWS", 1)
        planned = plan([file], prompts)
        write(tmp_path / "r", prompt_id=["a", "a", "b"], completion_text=["", "", None])
        with pytest.raises(InputError, match="row 2: completion_text is null"):
            PieceReader(planned).read(1)

    def test_groups_stay_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(completions, "PIECE_ROWS", 3)
        found = self.pieces(tmp_path, list("aaaabbcccd"))
        assert [names for _, names in found] == [list("aaaa"), list("bbccc"), list("d")]

    def test_scattered_groups_are_cut_where_none_is_open(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(completions, "PIECE_ROWS", 1)
        found = self.pieces(tmp_path, list("ababccdede"))
        assert [names for _, names in found] == [list("abab"), list("cc"), list("dede")]

    def test_tokens_close_a_piece_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(completions, "PIECE_TOKENS", 10)
        prompts = Prompts(prompts_table(tmp_path / "prompts.parquet", ["a", "b", "c"]))
        file = write(
            tmp_path / "rows.parquet",
            prompt_id=["a", "b", "c"],
            completion_text=["", "x" * 40, ""],
            prompt_ids=[[1, 2], [1], [1]],
            completion_ids=[[1] * 8, None, [1]],
        )
        assert [piece.rows for piece in plan([file], prompts)] == [1, 1, 1]

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30), st.integers(1, 6))
    def test_every_row_once_in_order(
        self, tmp_path_factory: pytest.TempPathFactory, names: list[str], rows: int
    ) -> None:
        before, completions.PIECE_ROWS = completions.PIECE_ROWS, rows
        try:
            found = [part for _, part in self.pieces(tmp_path_factory.mktemp("p"), names)]
        finally:
            completions.PIECE_ROWS = before
        assert [name for part in found for name in part] == names
        assert sum(len(set(part)) for part in found) == len(set(names))

    def test_one_large_file_becomes_several_shards_with_the_same_rows(
        self, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = [f"p{i}" for i in range(6)]
        prompts = prompts_table(tmp_path / "prompts.parquet", names)
        file = write(
            tmp_path / "rows.parquet",
            prompt_id=[name for name in names for _ in range(3)],
            completion_text=["12", "13", "7 + 5 is 12"] * 6,
        )
        whole = run(tmp_path / "whole", prompts, file, tiny_model)
        monkeypatch.setattr(completions, "PIECE_ROWS", 5)
        cut = run(tmp_path / "cut", prompts, file, tiny_model)
        assert (len(shard_files(whole)), len(shard_files(cut))) == (1, 3)
        one, other = (read_table(path, "annotated").to_pylist() for path in (whole, cut))
        for a, b in zip(one, other, strict=True):
            assert {**a, "old_logprobs": 0, "entropies": 0} == {
                **b, "old_logprobs": 0, "entropies": 0
            }  # fmt: skip
            assert a["entropies"] == pytest.approx(b["entropies"], abs=1e-5)


# --- text alone ------------------------------------------------------------------------------


class TestComplete:
    def table(self, *given: dict[str, Any]) -> pa.Table:
        absent = dict.fromkeys(
            ["sample_index", "prompt_ids", "completion_ids", "sampling_logprobs", "finish_reason",
             "seed", "policy_version"]
        )  # fmt: skip
        rows = [{**absent, "prompt_id": "p", "completion_text": "12", **row} for row in given]
        return pa.Table.from_pylist(rows, SCHEMAS["completions"])

    @pytest.fixture
    def prompts(self, tmp_path: Path) -> Prompts:
        return Prompts(prompts_table(tmp_path / "prompts.parquet", ["p"]))

    def test_everything_is_filled_in(self, prompts: Prompts, tiny_model: Path) -> None:
        tokenizer = load_tokenizer(tiny_model)
        rows = complete(
            self.table({}, {"completion_text": "1", "finish_reason": "length"}), prompts, tokenizer
        ).to_pylist()
        text = tokenizer.encode("p: 5 + 7 = ")
        one, two = tokenizer.encode("12")
        assert [row["prompt_ids"] for row in rows] == [text, text]
        assert [row["completion_ids"] for row in rows] == [[one, two, 1], [one]]  # 1: <eos>
        assert [row["sample_index"] for row in rows] == [0, 1]
        assert rows[0] | {"prompt_ids": 0, "completion_ids": 0} == {
            "prompt_id": "p",
            "sample_index": 0,
            "prompt_ids": 0,
            "completion_ids": 0,
            "completion_text": "12",
            "sampling_logprobs": None,
            "finish_reason": "stop",
            "seed": 0,
            "policy_version": "unknown",
        }

    def test_what_is_given_stays(self, prompts: Prompts) -> None:
        given = {
            "sample_index": 7,
            "prompt_ids": [5],
            "completion_ids": [6],
            "finish_reason": "length",
            "seed": 3,
            "policy_version": "v",
        }
        table = self.table(given)
        assert complete(table, prompts, None).to_pylist() == table.to_pylist()

    def test_an_end_of_sequence_in_the_text_is_not_doubled(
        self, prompts: Prompts, tiny_model: Path
    ) -> None:
        table = self.table({"completion_text": "1<eos>"})
        (ids,) = complete(table, prompts, load_tokenizer(tiny_model))["completion_ids"].to_pylist()
        assert ids[-1] == 1
        assert ids.count(1) == 1

    def test_samples_are_numbered_all_or_none(self, prompts: Prompts) -> None:
        with pytest.raises(InputError, match="prompt_id p: 1 of 2 rows have no sample_index"):
            complete(self.table({"sample_index": 0}, {}), prompts, None)


def test_text_alone_is_annotated_and_trained_on(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["p0", "p1", "p2"]
    prompts = prompts_table(tmp_path / "prompts.parquet", names)
    file = write(
        tmp_path / "mine.parquet",
        prompt_id=[name for name in names for _ in range(4)],
        completion_text=["12", "13", "It is 12", "no"] * 3,
    )
    with caplog.at_level(logging.INFO, "entrograd"):
        annotated = run(
            tmp_path,
            prompts,
            file,
            tiny_model,
            segments=CutoffSegments(kind="entropy_cutoff"),
        )
    assert "sampled by unknown, annotated by" in caplog.text
    rows = read_table(annotated, "annotated").to_pylist()
    assert [row["reward"] for row in rows] == [1, 0, 1, 0] * 3
    for row in rows:
        length = len(row["completion_text"]) + 1
        for column in ("completion_ids", "old_logprobs", "entropies", "segment_ids"):
            assert len(row[column]) == length
    line = train_offline(
        TrainOfflineParams(
            prompts_per_update=2, optimizer=Optimizer(lr=1e-3), dtype="float32", device="cpu"
        ),
        MethodParams(name="gtpo", weighting="seed_grpo"),
        tiny_model,
        annotated,
        tmp_path / "trained",
        tmp_path / "curve.csv",
        tmp_path / "resume_training",
    )
    assert line.startswith("2 updates of gtpo (weighting: seed_grpo) over 3 groups")
    before, after = (path / "model.safetensors" for path in (tiny_model, tmp_path / "trained"))
    assert sha256(before) != sha256(after)


@pytest.mark.parametrize(
    ("columns", "other", "message"),
    [
        ({"completion_text": ["12"]}, {}, "column prompt_id .* is missing"),
        ({"prompt_id": ["p"]}, {}, "column completion_text .* is missing"),
        ({"prompt_id": ["p", None], "completion_text": ["1", "2"]}, {}, "row 1: prompt_id is null"),
        (
            {"prompt_id": ["p"] * 600 + [None], "completion_text": ["1"] * 601},
            {},
            "row 600: prompt_id is null",
        ),
        ({"prompt_id": ["z"], "completion_text": ["12"]}, {}, "prompt_id z is not in"),
        (
            {"prompt_id": ["p"], "completion_text": [""], "finish_reason": ["length"]},
            {},
            "prompt_id p, sample_index 0: completion_ids is empty",
        ),
        ({"prompt_id": ["p"], "completion_text": ["1" * 300]}, {}, "tokens do not fit the context"),
        (
            {"prompt_id": ["p"], "completion_text": ["12"]},
            {"prompt_text": None},
            "prompt p: set exactly one of messages and prompt_text",
        ),
        (
            {"prompt_id": ["p"], "completion_text": ["12"], "completion_ids": ["12"]},
            {},
            "column completion_ids is string, expected list",
        ),
    ],
)
def test_bad_tables(
    tmp_path: Path,
    tiny_model: Path,
    columns: dict[str, list[Any]],
    other: dict[str, Any],
    message: str,
) -> None:
    prompts = prompts_table(tmp_path / "prompts.parquet", ["p"], **other)
    file = write(tmp_path / "mine.parquet", **columns)
    with pytest.raises(InputError, match=message) as raised:
        run(tmp_path, prompts, file, tiny_model)
    assert "mine.parquet" in str(raised.value)
    assert not (tmp_path / "annotated").exists()


# --- segments --------------------------------------------------------------------------------


class TestSegments:
    def test_entropy_cutoff(self) -> None:
        chosen = CutoffSegments(kind="entropy_cutoff", cutoff=2.0)
        found = segment_ids([np.array([0.1, 2.5, 0.3, 0.2, 3.0, 0.1]), np.array([0.5])], chosen)
        assert [ids.tolist() for ids in found] == [[0, 0, 1, 1, 1, 2], [0]]

    def test_change(self) -> None:
        # Jumps above 1 at the third and fifth token; a crossing of 1.5 at the last.
        entropies = [np.array([0.1, 0.2, 1.4, 1.3, 0.1, 0.2, 1.0, 1.6])]
        chosen = ChangeSegments(kind="change", delta=1.0, baseline=1.5, min_length=1)
        assert segment_ids(entropies, chosen)[0].tolist() == [0, 0, 1, 1, 2, 2, 2, 3]
        longer = chosen.model_copy(update={"min_length": 2})
        assert segment_ids(entropies, longer)[0].tolist() == [0, 0, 1, 1, 2, 2, 2, 2]

    @pytest.mark.parametrize(
        ("chosen", "segmentation"),
        [
            (ChangeSegments(kind="change", delta=0.4, baseline=0.9, min_length=2), "change"),
            (CutoffSegments(kind="entropy_cutoff", cutoff=1.2), "entropy_cutoff"),
        ],
    )
    def test_asr_gives_the_same_advantages_from_stored_segments(
        self, chosen: Any, segmentation: str
    ) -> None:
        import torch

        from entrograd.methods.advantage.asr import Asr
        from entrograd.methods.batch import Batch

        lengths, width = [9, 4, 6], 9
        entropies = torch.rand(3, width, generator=torch.Generator().manual_seed(5)) * 2
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        stored = segment_ids(
            [row[:n].numpy() for row, n in zip(entropies, lengths, strict=True)], chosen
        )
        batch = Batch(
            completion_mask=mask,
            groups=torch.zeros(3, dtype=torch.long),
            rewards=torch.tensor([1.0, 0.0, 1.0]),
            old_logprobs=-entropies,
            entropies=entropies,
            segment_ids=torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in stored]),
        )
        own = {key: value for key, value in chosen.model_dump().items() if key != "kind"}
        base = {"source": "entropy", "baseline": 0.9}
        computed = Asr(segmentation=segmentation, **(base | own))  # type: ignore[arg-type]
        read = Asr(segmentation="stored", **base)  # type: ignore[arg-type]
        assert torch.equal(read.advantages(batch), computed.advantages(batch))
        assert "segment_ids" in read.required_columns
        assert len({len(set(ids)) for ids in stored}) > 1


# --- other readers ---------------------------------------------------------------------------


class TestReaders:
    """Plain readers see the annotated folder's rows, lists of numbers as such."""

    @pytest.fixture(scope="class")
    def table(self, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
        folder = tmp_path_factory.mktemp("readers")
        prompts = prompts_table(folder / "prompts.parquet", ["p0", "p1"])
        rows = ["p0", "p0", "p1", "p1"]
        file = write(folder / "r.parquet", prompt_id=rows, completion_text=["12", "1", "12", "7"])
        return run(folder, prompts, file, tiny_model)

    @pytest.fixture
    def expected(self, table: Path) -> float:
        """Mean token entropy of the correct completions."""
        rows = read_table(table, "annotated").to_pylist()
        values = [v for row in rows if row["reward"] > 0 for v in row["entropies"]]
        assert len(values) == 6
        return sum(values) / 6

    def test_duckdb(self, table: Path, expected: float) -> None:
        import duckdb

        query = f"""
            select avg(h) from (
                select unnest(entropies) as h from '{table}/*.parquet' where reward > 0)
        """
        assert duckdb.connect().execute(query).fetchall()[0][0] == pytest.approx(expected)

    def test_polars(self, table: Path, expected: float) -> None:
        import polars as pl

        frame = pl.read_parquet(f"{table}/*.parquet").filter(pl.col("reward") > 0)
        assert frame["entropies"].explode().mean() == pytest.approx(expected, rel=1e-6)

    def test_datasets(self, table: Path, expected: float, tmp_path: Path) -> None:
        from datasets import load_dataset

        cache = str(tmp_path)
        data = load_dataset("parquet", data_dir=str(table), split="train", cache_dir=cache)
        assert data.num_rows == load_dataset(str(table), split="train", cache_dir=cache).num_rows
        values = [v for row in data if row["reward"] > 0 for v in row["entropies"]]
        assert sum(values) / len(values) == pytest.approx(expected)
        groups = load_dataset(
            "parquet",
            data_files=str(table.parent / "groups.parquet"),
            split="train",
            cache_dir=cache,
        )
        assert groups["kernel_language_entropy"][:] == pytest.approx([0.6931472] * 2)
