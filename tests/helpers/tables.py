"""Small tables of prompts and of annotated completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from entrograd.data.groups import PromptGroup, groups_of
from entrograd.storage.schemas import SCHEMAS
from entrograd.storage.tables import write_table


def write_prompts(path: Path, count: int) -> None:
    """A table of `count` training prompts `0 = `, `1 = `, ... that any digit answers: a random
    model hits some."""
    rows = [
        {
            "prompt_id": f"id{i}",
            "source": "s",
            "split": "train",
            "problem": f"{i}",
            "answers": list("0123456789"),
            "prompt_text": f"{i} = ",
        }
        for i in range(count)
    ]
    write_table(path, rows, "prompts")


def prompts_table(path: Path, count: int, split: str = "train") -> Path:
    rows = [
        {
            "prompt_id": f"id{i}",
            "source": "s",
            "split": split,
            "problem": f"{i} + 1",
            "answers": [str(i + 1)],
            "prompt_text": f"{i} + 1 = ",
        }
        for i in range(count)
    ]
    write_table(path, rows, "prompts")
    return path


def annotated_rows() -> list[dict[str, Any]]:
    """Two groups of three: one with a signal, one all wrong; ragged completions."""
    completions = [[6, 7], [8, 9, 10], [11], [12, 13], [14], [15, 16, 17]]
    rewards = [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    return [
        {
            "prompt_id": f"p{i // 3}",
            "sample_index": i % 3,
            "prompt_ids": [5, 6, 7 + i // 3],
            "completion_ids": ids,
            "completion_text": "x",
            "sampling_logprobs": None,
            "finish_reason": "stop",
            "seed": 0,
            "policy_version": "v",
            "answer": str(reward),
            "reward": reward,
            "reward_status": "ok",
            "reward_heads": None,
            "old_logprobs": [-1.0 - 0.1 * k for k in range(len(ids))],
            "entropies": [0.5 + 0.1 * k for k in range(len(ids))],
            "segment_ids": None,
            "cluster_id": int(reward),
        }
        for i, (ids, reward) in enumerate(zip(completions, rewards, strict=True))
    ]


def groups(rows: list[dict[str, Any]]) -> list[PromptGroup]:
    """The groups of annotated rows, as a table holds them; with `ref_logprobs`, if rows have
    them."""
    built = groups_of(pa.Table.from_pylist(rows, SCHEMAS["annotated"]), "rows")
    for group in built:
        for completion in group.completions:
            (row,) = (
                row
                for row in rows
                if (row["prompt_id"], row["sample_index"])
                == (group.prompt_id, completion.sample_index)
            )
            if "ref_logprobs" in row:
                completion.tokens["ref_logprobs"] = np.array(row["ref_logprobs"], np.float32)
    return built
