"""Peak memory of stage annotate by the number of completions: it should not depend on it.

Synthetic rollouts (groups of 8, a prompt of 24 tokens, completions of 16 to 48) stand in one
Parquet file with one row group; a two-layer model annotates them, each size in a process of its
own. Printed are the peak resident memory of each and the growth from the first size to the last.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from entrograd.annotate.params import AnnotateParams
from entrograd.environment import peak_mib
from entrograd.storage.files import write_json
from entrograd.storage.tables import write_table

GROUP, PROMPT, SHORTEST, LONGEST, VOCABULARY = 8, 24, 16, 48, 512


def write_model(path: Path) -> None:
    """A two-layer Llama of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def write_tables(folder: Path, completions: int) -> None:
    """The prompts table, and the rollouts written as one row group."""
    draw = np.random.default_rng(0)
    names = [f"p{i:07d}" for i in range(completions // GROUP)]
    rows: list[dict[str, Any]] = [
        {
            "prompt_id": name,
            "source": "synthetic",
            "split": "train",
            "problem": name,
            "answers": ["7"],
            "prompt_text": name,
        }
        for name in names
    ]
    write_table(folder / "prompts.parquet", rows, "prompts")
    lengths = draw.integers(SHORTEST, LONGEST + 1, completions)
    ids = pa.array(draw.integers(0, VOCABULARY, int(lengths.sum())), pa.int32())
    prompts = pa.array(draw.integers(0, VOCABULARY, len(names) * PROMPT), pa.int32())
    of_group = pa.FixedSizeListArray.from_arrays(prompts, PROMPT).cast(pa.list_(pa.int32()))
    table = pa.table(
        {
            "prompt_id": [name for name in names for _ in range(GROUP)],
            "sample_index": pa.array(list(range(GROUP)) * len(names), pa.int32()),
            "prompt_ids": of_group.take(pa.array(np.repeat(np.arange(len(names)), GROUP))),
            "completion_ids": pa.ListArray.from_arrays(
                pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32()), ids
            ),
            "completion_text": [f"The answer is {n}" for n in draw.integers(5, 10, completions)],
        }
    )
    pq.write_table(table, folder / "rollouts.parquet", row_group_size=completions)


def annotate(folder: Path) -> None:
    """Annotate the tables in `folder`; print the peak memory in MiB and the seconds as JSON."""
    from entrograd.annotate.annotate import annotate as stage

    start = time.perf_counter()
    out = folder / "out"
    stage(
        AnnotateParams(dtype="float32", device="cpu"),
        prompts=folder / "prompts.parquet",
        rollouts=folder / "rollouts.parquet",
        model=folder / "model",
        out=out / "annotated",
        groups=out / "groups.parquet",
        summary=out / "annotate.json",
        reward_heads=out / "reward_heads.json",
        resume=folder / "resume",
    )
    print(json.dumps({"mib": round(peak_mib()), "seconds": round(time.perf_counter() - start, 1)}))


def main() -> int:
    """Run each size, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--out", default="benchmarks/results/annotate_stream.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        annotate(options.child)
        return 0
    found = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_model(folder / "model")
            write_tables(folder, size)
            command = [sys.executable, __file__, "--child", scratch]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[str(size)] = json.loads(done.stdout.splitlines()[-1])
        print(f"{size:>9} completions: {found[str(size)]['mib']} MiB at most, "
              f"{found[str(size)]['seconds']} s")  # fmt: skip
    first, last = (found[str(options.sizes[i])]["mib"] for i in (0, -1))
    print(f"memory at {options.sizes[-1]} over memory at {options.sizes[0]}: {last / first:.2f}")
    write_json(options.out, {"sizes": found, "ratio_memory": round(last / first, 3)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
