"""What reading a table guarantees of its columns' types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrograd.errors import InputError
from entrograd.storage import tables
from entrograd.storage.tables import read_table


def prompts(**columns: Any) -> dict[str, Any]:
    return {
        "prompt_id": ["a", "b"],
        "source": ["s", "s"],
        "split": ["train", "train"],
        "problem": ["1", "2"],
        "answers": [["1"], ["2", "two"]],
        **columns,
    }


MESSAGES = [[{"role": "user", "content": 1}]] * 2


@pytest.mark.parametrize(
    ("column", "values", "types"),
    [
        ("problem", [1, 2], "int64, expected string"),
        ("problem", [1.5, 2.0], "double, expected string"),
        ("problem", [True, False], "bool, expected string"),
        ("answers", [[1], [2]], r"list<.*int64>, expected list<.*string>"),
        ("answers", ["1", "2"], r"string, expected list<.*string>"),
        ("messages", MESSAGES, r"list<.*content: int64.*>, expected list<.*content: string.*>"),
    ],
)
def test_a_column_of_another_type_is_refused(
    tmp_path: Path, column: str, values: Any, types: str
) -> None:
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.table(prompts(**{column: values})), path)
    with pytest.raises(InputError, match=rf"prompts\.parquet: column {column} is {types}"):
        read_table(path, "prompts")


@pytest.mark.parametrize(
    ("reward", "types"),
    [(["1", "0"], "string, expected float"), ([True, False], "bool, expected float")],
)
def test_a_number_is_a_number(reward: list[Any], types: str) -> None:
    from entrograd.storage.schemas import validate

    groups = {
        "prompt_id": ["a", "b"],
        "completions": [8.0, 8.0],  # as pandas has integers where some were null
        "clusters": [2, 1],
        "mean_reward": reward,
        **{
            f"semantic_entropy_{name}": [0, 1]  # no fractions in any row
            for name in ("rao", "discrete", "paper")
        },
        "mean_token_entropy": [0.5, 0.25],
    }
    with pytest.raises(InputError, match=f"file: column mean_reward is {types}"):
        validate(pa.table(groups), "groups", "file")
    read = validate(pa.table({**groups, "mean_reward": [1, 0]}), "groups", "file").to_pylist()
    assert [(row["completions"], row["mean_reward"]) for row in read] == [(8, 1.0), (8, 0.0)]
    with pytest.raises(InputError, match=r"column completions is double, expected int32: .*8\.5"):
        validate(
            pa.table({**groups, "mean_reward": [1, 0], "completions": [8.5, 8]}), "groups", "file"
        )


def test_other_ways_to_hold_the_same_are_read(tmp_path: Path) -> None:
    """As Polars, pandas and `datasets` write them."""
    table = pa.table(
        prompts(
            problem=pa.array(["1", "2"], pa.large_string()),
            source=pa.array(["s", "s"]).dictionary_encode(),
            answers=pa.array([["1"], ["2", "two"]], pa.large_list(pa.large_string())),
            level=pa.nulls(2),
            messages=pa.nulls(2, pa.list_(pa.null())),
        )
    )
    pq.write_table(table, tmp_path / "prompts.parquet")
    rows = read_table(tmp_path / "prompts.parquet", "prompts").to_pylist()
    assert [{key: row[key] for key in prompts()} for row in rows] == [
        dict(zip(prompts(), values, strict=True))
        for values in zip(*prompts().values(), strict=True)
    ]
    assert all(row["level"] is None and row["messages"] is None for row in rows)


def test_a_long_table_is_written_and_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROWS", 2)
    monkeypatch.setattr(tables, "ROW_GROUP", 4)
    rows = [
        {"source": "a", "row": number, "reason": "r", "content": None, "line": None}
        for number in range(9)
    ]
    file = tmp_path / "rejects.parquet"
    tables.write_table(file, iter(rows), "rejects")
    metadata = pq.read_metadata(file)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [4, 4, 1]
    whole = read_table(file, "rejects")
    assert whole.to_pylist() == rows
    batches = list(tables.read_batches(file, "rejects", 3))
    assert max(map(len, batches)) <= 3
    assert pa.concat_tables(batches).equals(whole)
    some = pa.concat_tables(tables.read_batches(file, "rejects", 3, ["row", "reason"]))
    assert some.equals(whole.select(["row", "reason"]))


def test_a_long_table_is_checked_in_parts(tmp_path: Path) -> None:
    good = {"source": "a", "row": 1, "reason": "missing answer", "content": ""}
    file = tmp_path / "rejects.parquet"
    pq.write_table(pa.Table.from_pylist([good] * 4 + [{**good, "reason": None}]), file)
    with pytest.raises(InputError, match=r"rejects.parquet: row 4: reason is null"):
        list(tables.read_batches(file, "rejects", 2))
    pq.write_table(pa.table({"source": ["a"]}), file)
    with pytest.raises(InputError, match=r"column row \(int\d+\) is missing"):
        list(tables.read_batches(file, "rejects", 2, ["source"]))
