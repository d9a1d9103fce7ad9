"""Groups of completions between Arrow and tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from entrograd.data.groups import groups_of, table_of
from entrograd.errors import InputError
from entrograd.storage.schemas import SCHEMAS


def row(prompt: str, index: int, length: int, **more: Any) -> dict[str, Any]:
    return {
        "prompt_id": prompt,
        "sample_index": index,
        "prompt_ids": [1, 2, ord(prompt)],
        "completion_ids": list(range(length)),
        "completion_text": "x" * length,
        "sampling_logprobs": None,
        "finish_reason": "stop",
        "seed": 2**62,
        "policy_version": "v",
        "answer": None if index else "7",
        "extraction_rule": None,
        "reward": 0.5,
        "reward_status": "ok",
        "reward_heads": [{"name": "format", "value": 0.25}] if index else None,
        "old_logprobs": [-0.1 * i for i in range(length)],
        "entropies": [0.3] * length,
        "segment_ids": [0] * length if index else None,
        "cluster_id": index,
        "token_scores": None,
        **more,
    }


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), SCHEMAS["annotated"])


ROWS = [row("a", 0, 3), row("b", 0, 0), row("a", 1, 2), row("b", 1, 4)]


def test_a_table_goes_to_groups_and_back() -> None:
    """In the order of first appearance, nulls and empty lists included."""
    groups = groups_of(table(*ROWS), "here")
    assert [(group.prompt_id, len(group)) for group in groups] == [("a", 2), ("b", 2)]
    assert table_of(groups, "annotated").equals(table(ROWS[0], ROWS[2], ROWS[1], ROWS[3]))
    rollouts = table_of(groups, "rollouts")
    assert rollouts.schema == SCHEMAS["rollouts"]
    assert rollouts.column("completion_text").to_pylist() == ["xxx", "xx", "", "xxxx"]


def test_tokens_are_views_of_the_table() -> None:
    whole = table(*ROWS)
    (_, second) = groups_of(whole.slice(1), "here")[0].completions
    assert second.tokens["old_logprobs"].dtype == np.float32
    buffer = whole["old_logprobs"].chunk(0).values.buffers()[1]
    address = second.tokens["old_logprobs"].__array_interface__["data"][0]
    assert buffer.address <= address < buffer.address + buffer.size


def test_a_column_of_another_length_is_named() -> None:
    bad = row("a", 1, 3, entropies=[0.1, 0.2])
    with pytest.raises(InputError, match=r"here: row 1: entropies has 2 values for 3 completion"):
        groups_of(table(ROWS[0], bad), "here")


def test_a_group_has_one_prompt() -> None:
    with pytest.raises(InputError, match=r"here: row 1: prompt_ids differ .* prompt a;"):
        groups_of(table(ROWS[0], row("a", 1, 3, prompt_ids=[9])), "here")
