"""Grading and clustering of up to a million completions: time and memory by their number.

The problems of grading.py, drawn again and again; each time their group of 8 is written anew. A
process of its own grades each file and clusters by mathematical answers, a batch of lines at a
time, with one worker. Seconds are of processor time of all processes; memory is the sum of the
peaks of the main process, the worker and its fork.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from grading import SHARED, SIZE, UNFINISHED, descendants, form, group, now, problems

from entrograd.annotate.clusters import Group, by_answer
from entrograd.environment import peak_mib
from entrograd.rewards.params import GraderParams
from entrograd.rewards.verify.grade import Grader
from entrograd.rewards.verify.rows import grade_file
from entrograd.storage.files import write_json

BATCH = 512  # groups clustered at once


def write_groups(path: Path, completions: int, data: Path) -> None:
    """A JSONL file of groups: problem, accepted answers, completions, finish reasons."""
    known = problems(data, 10_000)
    golds = [problem.accepted for problem in known]
    rng = random.Random(completions)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(completions // SIZE):
            gold = rng.choice(golds)
            texts = group(gold, golds, rng)
            reasons = ["length" if text == UNFINISHED else "stop" for text in texts]
            row = {"answer": [form(answer, rng) for answer in gold], "completions": texts}
            file.write(json.dumps(row | {"problem": gold[0], "finish_reason": reasons}) + "\n")


def child(path: Path) -> dict[str, Any]:
    """Grade and cluster a file; what it took."""
    logging.disable(logging.CRITICAL)
    statuses: Counter[str] = Counter()
    clusters = reward = 0.0
    with Grader(GraderParams(workers=1)) as grader:
        start = now()
        rows = grade_file(path, grader)
        while batch := list(itertools.islice(rows, BATCH)):
            groups = [Group(row["problem"], row["completions"], row["extracted"]) for row in batch]
            clusters += sum(len(set(found.ids)) for found in by_answer(groups, grader))
            for row in batch:
                reward += sum(row["reward"])
                statuses.update(row["reward_status"])
        end = now()
        peaks = [peak_mib(pid) for pid in descendants()]
    return {
        "mib": round(sum(peaks)),
        "processor_seconds": round(end.processor - start.processor, 1),
        "seconds": round(end.clock - start.clock, 1),
        "mean_reward": round(reward / statuses.total(), 4),
        "clusters_a_group": round(clusters * SIZE / statuses.total(), 4),
        "statuses": dict(sorted(statuses.items())),
    }


def main() -> int:
    """Run each size, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the shared data")
    parser.add_argument("--out", default="benchmarks/results/grading_stream.json")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child)))
        return 0
    found = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "groups.jsonl"
            write_groups(file, size, options.data)
            command = [sys.executable, __file__, "--child", str(file)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[str(size)] = json.loads(done.stdout.splitlines()[-1])
        print(f"{size:>9} completions: {json.dumps(found[str(size)])}", flush=True)
    first, last = (found[str(options.sizes[i])]["mib"] for i in (0, -1))
    write_json(options.out, {"sizes": found, "ratio_memory": round(last / first, 3)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
