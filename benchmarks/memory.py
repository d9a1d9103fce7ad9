"""Peak memory of stage train_offline as its table grows: `python benchmarks/memory.py [COUNT ...]`.

Tables of COUNT completions (1,000 and 10,000 if none is given) of 200 tokens, in one Parquet file
each, a model of two small layers, two updates in a process of their own. Writes
benchmarks/results/memory.json.
"""

from __future__ import annotations

import json
import resource
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

from entrograd.methods.params import MethodParams
from entrograd.storage.files import write_json
from entrograd.storage.schemas import SCHEMAS
from entrograd.storage.tables import write_table
from entrograd.train import offline

SIZES = (1_000, 10_000)
TOKENS, GROUP, PROMPT, UPDATES, WORDS = 200, 8, 40, 2, 64
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


def train(folder: Path, table: Path) -> float:
    """Some updates on the table; the peak memory of this process, in MiB."""
    from entrograd.train.params import TrainOfflineParams

    schedule = offline.schedule
    offline.schedule = lambda *given: schedule(*given)[:UPDATES]
    params = TrainOfflineParams(dtype="float32", device="cpu", prompts_per_update=4)
    places = [folder / name for name in ("out", "curve.csv", "resume")]
    offline.train_offline(params, MethodParams(name="grpo"), folder / "model", table, *places)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(folder: Path, sizes: Sequence[int]) -> dict[str, float]:
    """MiB by number of completions, each in a process of its own."""
    write_model(folder / "model")
    found = {}
    for size in sizes:
        table = folder / f"{size}.parquet"
        for step in ("write", "train"):
            words = [sys.executable, __file__, step, str(folder), str(table), str(size)]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
        found[str(size)] = round(float(done.stdout.split()[-1]), 1)
    return found


def main() -> None:
    """Measure the sizes given, or one step of that in its own process."""
    if sys.argv[1:2] in (["write"], ["train"]):
        step, folder, table, size = sys.argv[1:]
        if step == "write":
            write_rows(Path(table), int(size))
        else:
            print(train(Path(folder), Path(table)))
        return
    with tempfile.TemporaryDirectory() as folder:
        after = measure(Path(folder), [*map(int, sys.argv[1:])] or SIZES)
    write_json(RESULT, {"tokens": TOKENS, "updates": UPDATES, "peak_mib": after})
    print(json.dumps(after))


if __name__ == "__main__":
    main()
