"""Peak memory of stage train_offline as its table grows: `python benchmarks/memory.py [COUNT ...]`.

Tables of COUNT completions (1,000, 10,000 and 100,000 if none is given) of 200 tokens, each a
Parquet file of one row group; a model of two small layers; some updates in a process of their own.
Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from entrograd.environment import peak_mib
from entrograd.methods.params import MethodParams
from entrograd.storage.files import write_json
from entrograd.storage.schemas import SCHEMAS
from entrograd.storage.tables import write_table
from entrograd.train import offline
from entrograd.train.params import TrainOfflineParams

SIZES = (1_000, 10_000, 100_000)
TOKENS, GROUP, PROMPT, UPDATES, WORDS = 200, 8, 40, 20, 64
RESULT = Path(__file__).parent / "results/memory.json"


def write_model(folder: Path) -> None:
    """A Llama of two small layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {str(i): i for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def lists(values: np.ndarray) -> pa.Array:
    """A list column of the rows of a matrix."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(offsets, values.ravel())


def write_rows(path: Path, count: int) -> None:
    """An annotated table of `count` completions, values drawn by a fixed seed."""
    draw = np.random.default_rng(0)
    prompts = np.repeat(draw.integers(3, WORDS, (count // GROUP, PROMPT), np.int32), GROUP, 0)
    columns = {
        "prompt_id": [f"p{row // GROUP}" for row in range(count)],
        "sample_index": np.arange(count) % GROUP,
        "prompt_ids": lists(prompts),
        "completion_ids": lists(draw.integers(3, WORDS, (count, TOKENS), np.int32)),
        "completion_text": ["x" * TOKENS] * count,
        "sampling_logprobs": lists(-draw.random((count, TOKENS), np.float32)),
        "finish_reason": ["length"] * count,
        "seed": np.zeros(count, np.int64),
        "policy_version": ["v"] * count,
        "reward": draw.integers(0, 2, count).astype(np.float32),
        "reward_status": ["ok"] * count,
        "old_logprobs": lists(-4 - draw.random((count, TOKENS), np.float32)),
        "entropies": lists(4 * draw.random((count, TOKENS), np.float32)),
        "cluster_id": np.zeros(count, np.int32),
    }
    table = pa.table({k: v if isinstance(v, pa.Array) else pa.array(v) for k, v in columns.items()})
    assert set(columns) <= set(SCHEMAS["annotated"].names)
    write_table(path, table, "annotated")


def train(model: Path, table: Path, out: Path) -> float:
    """Some updates on the table; the peak memory of this process, in MiB."""
    schedule = offline.schedule
    offline.schedule = lambda *given: schedule(*given)[:UPDATES]
    params = TrainOfflineParams(dtype="float32", device="cpu", prompts_per_update=4)
    places = [out / name for name in ("weights", "curve.csv", "resume")]
    offline.train_offline(params, MethodParams(name="grpo"), model, table, *places)
    return peak_mib()


def measure(folder: Path, sizes: Sequence[int]) -> dict[str, float]:
    """MiB by number of completions, each in a process of its own."""
    model, found = folder / "model", {}
    write_model(model)
    for size in sizes:
        table = folder / f"{size}.parquet"
        write_rows(table, size)
        words = [sys.executable, __file__, "train", model, table, folder / str(size)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        found[str(size)] = round(float(done.stdout.split()[-1]), 1)
    return found


def main() -> None:
    """Measure the sizes given, or train in a process of its own."""
    if sys.argv[1:2] == ["train"]:
        model, table, out = map(Path, sys.argv[2:])
        print(train(model, table, out))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), [*map(int, sys.argv[1:])] or SIZES)
    write_json(RESULT, {"tokens": TOKENS, "updates": UPDATES, "peak_mib": found})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
