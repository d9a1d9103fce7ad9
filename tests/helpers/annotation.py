"""Prompts and rollouts on disk for stage annotate, and what it writes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entrograd.annotate.annotate import annotate
from entrograd.annotate.params import AnnotateParams
from entrograd.data.prompt import PromptRow
from entrograd.rollout.params import Sampling
from entrograd.storage.tables import shard_name, write_manifest, write_table

SETTINGS = AnnotateParams(dtype="float32", device="cpu")
PROMPT_IDS = [10, 11, 12]


def rollout(prompt: str, sample: int, text: str, **other: Any) -> dict[str, Any]:
    """A row of the rollouts table; the tokens are those of the tiny model, one per character."""
    return {
        "prompt_id": prompt,
        "sample_index": sample,
        "prompt_ids": PROMPT_IDS,
        "completion_ids": [3 + ord(character) % 60 for character in text],
        "completion_text": text,
        "sampling_logprobs": None,
        "finish_reason": "stop",
        "seed": 0,
        "policy_version": "elsewhere",
        **other,
    }


def known(answers: dict[str, list[str]]) -> dict[str, PromptRow]:
    return {
        prompt: {
            "prompt_id": prompt,
            "source": "test",
            "split": "train",
            "problem": prompt,
            "answers": accepted,
            "level": None,
            "messages": None,
            "prompt_text": prompt,
        }
        for prompt, accepted in answers.items()
    }


def prompts_table(path: Path, answers: dict[str, list[str]]) -> Path:
    write_table(path, list(known(answers).values()), "prompts")
    return path


class Files:
    """Prompts and sharded rollouts on disk, and where outputs go."""

    def __init__(self, folder: Path, model: Path, shards: int = 3) -> None:
        self.folder, self.model = folder, model
        names = [f"p{i}" for i in range(2 * shards)]
        self.prompts = prompts_table(folder / "prompts.parquet", {n: ["12"] for n in names})
        self.rollouts = folder / "rollouts"
        self.rollouts.mkdir()
        for index in range(shards):
            rows = [
                rollout(name, sample, text)
                for name in names[2 * index : 2 * index + 2]
                for sample, text in enumerate(["12\n", "13\n", "12.0\n7 + 5", "no\n"])
            ]
            self.write(index, rows)
        write_manifest(self.rollouts)

    def write(self, index: int, rows: list[dict[str, Any]], temperature: float = 0.7) -> None:
        sampling = Sampling(temperature=temperature).model_dump()
        write_table(self.rollouts / shard_name(index), rows, "rollouts", sampling=sampling)

    def run(self, resume: Path, out: str = "out", settings: AnnotateParams = SETTINGS) -> str:
        place = self.folder / out
        return annotate(
            settings,
            self.prompts,
            self.rollouts,
            self.model,
            place / "annotated",
            place / "groups.parquet",
            place / "annotate.json",
            place / "reward_heads.json",
            resume,
        )
