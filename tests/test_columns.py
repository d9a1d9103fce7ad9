"""A column made up for this test goes from Parquet to groups and back: its line in the registry and
whoever writes it are all it takes before the batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from entrograd.data import groups
from entrograd.storage import columns, schemas
from entrograd.storage.columns import Column
from entrograd.storage.tables import read_table, write_table

SURPRISE = Column("surprise", "token", pa.float32(), "made up", "annotate", "nats", optional=True)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ANNOTATED had one line more."""
    annotated = (*columns.ANNOTATED, SURPRISE)
    monkeypatch.setitem(columns.TABLES, "annotated", annotated)
    monkeypatch.setitem(columns.TOKEN_COLUMNS, SURPRISE.name, SURPRISE)
    monkeypatch.setitem(schemas.SCHEMAS, "annotated", pa.schema([c.field for c in annotated]))


def test_a_new_token_column_is_stored_and_read(tmp_path: Path) -> None:
    completion = groups.Completion(
        sample_index=0,
        completion_ids=np.array([4, 5], np.int32),
        completion_text="45",
        finish_reason="stop",
        seed=0,
        policy_version="v",
        tokens={
            "old_logprobs": np.array([-1, -2], np.float32),
            "entropies": np.array([1, 2], np.float32),
            "surprise": np.array([0.25, 8], np.float32),
        },
        reward=1.0,
        reward_status="ok",
        cluster_id=0,
    )
    without = dataclasses.replace(completion, sample_index=1, tokens=dict(completion.tokens))
    del without.tokens["surprise"]
    group = groups.PromptGroup("p", np.array([1], np.int32), [completion, without])
    file = tmp_path / "annotated.parquet"
    write_table(file, groups.table_of([group], "annotated"), "annotated")
    ((first, second),) = [
        each.completions for each in groups.groups_of(read_table(file, "annotated"), str(file))
    ]
    assert first.tokens["surprise"].tolist() == [0.25, 8]
    assert "surprise" not in second.tokens
