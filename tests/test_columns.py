"""A column made up for this test goes from Parquet to groups to a batch: its line in the registry,
a field of Batch and whoever writes it are all it takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from entrograd.cli.columns_page import document
from entrograd.data import groups
from entrograd.errors import NonFiniteError
from entrograd.methods.batch import Batch, check_finite
from entrograd.storage import columns, schemas
from entrograd.storage.columns import Column
from entrograd.storage.tables import read_table, write_table
from entrograd.train import batch
from helpers.paths import ROOT

SURPRISE = Column(
    "surprise", "token", pa.float32(), "made up", "annotate", "nats", True, "surprise"
)


@dataclasses.dataclass(frozen=True)
class WiderBatch(Batch):
    """As if Batch had one field more."""

    surprise: Tensor | None = None


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ANNOTATED had one line more."""
    annotated = (*columns.ANNOTATED, SURPRISE)
    monkeypatch.setitem(columns.TABLES, "annotated", annotated)
    monkeypatch.setitem(columns.TOKEN_COLUMNS, SURPRISE.name, SURPRISE)
    monkeypatch.setitem(columns.BATCH_COLUMNS, SURPRISE.name, SURPRISE)
    monkeypatch.setattr(batch, "Batch", WiderBatch)
    monkeypatch.setitem(schemas.SCHEMAS, "annotated", pa.schema([c.field for c in annotated]))


@pytest.mark.usefixtures("registered")
def test_a_new_token_column_reaches_the_batch(tmp_path: Path) -> None:
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

    alike = groups.PromptGroup("p", np.array([1], np.int32), [first])
    made = batch.examples([alike], torch.device("cpu")).batch
    assert isinstance(made, WiderBatch)
    assert made.surprise is not None
    assert made.surprise.tolist() == [[0.25, 8]]
    mixed = batch.examples([group], torch.device("cpu")).batch
    assert isinstance(mixed, WiderBatch)
    assert mixed.surprise is None
    with pytest.raises(NonFiniteError, match="prompt p: row 0: token 1 surprise is nan"):
        check_finite(dataclasses.replace(made, surprise=torch.tensor([[1, torch.nan]])))


def test_the_page_is_what_the_registry_says() -> None:
    """`python -m entrograd.cli.columns_page` writes it."""
    assert (ROOT / "docs/columns.md").read_text() == document()
