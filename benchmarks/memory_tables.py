"""Peak memory of `prepare` and `report` on made-up rows, each in a process of its own:
`python benchmarks/memory_tables.py [ROWS [PROBLEMS]]` (50,000 of 3,000 if not given).

Rows of `prepare` are problems of 25 words, three in ten of them duplicates; those of `report` are
samples of 400 characters of PROBLEMS problems, by two models. Writes
benchmarks/results/memory_tables.json, with the hash of what was written: equal where only memory
differs.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from entrograd.data.params import FileSource, PrepareParams
from entrograd.data.prepare import prepare
from entrograd.environment import peak_mib
from entrograd.pipeline.rules import read
from entrograd.pipeline.sections import Params
from entrograd.report.browser import Inputs, report
from entrograd.storage.files import write_json
from entrograd.storage.tables import write_table

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/results/memory_tables.json"
WORDS = ("apple", "train", "river", "stone", "cloud", "market", "seven", "garden", "window")


def write_problems(path: Path, rows: int) -> None:
    """JSONL of problem and answer, drawn by a fixed seed."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            number = draw.randrange(rows * 7 // 10)
            words = random.Random(number)
            said = [f"{words.choice(WORDS)}{words.randrange(999)}" for _ in range(25)]
            problem = f"Problem {number}: {' '.join(said)} how many?"
            file.write(json.dumps({"problem": problem, "answer": str(number % 97)}) + "\n")


def samples(rows: int, problems: int) -> Iterator[dict[str, object]]:
    """Completions of each problem by each of two models: the first of all, then the second, ..."""
    for row in range(rows):
        draw, problem = divmod(row // 2, problems)
        yield {
            "model": ("base", "online")[row % 2],
            "benchmark": "heldout",
            "problem_id": f"p{problem}",
            "sample_index": draw,
            "problem": f"What is {problem} + 1?",
            "answers": [str(problem + 1)],
            "completion_text": f"{row:08d} " * 45,
            "reward": float(row % 3 == 0),
            "reward_status": "ok",
            "finish_reason": "stop",
        }


def run(what: str, folder: Path, rows: int) -> tuple[float, str]:
    """Peak memory of this process (MiB), and the hash of all outputs."""
    out = folder / what
    out.mkdir()
    if what == "prepare":
        source = FileSource(kind="file", path=str(folder / "problems.jsonl"))
        places = [out / name for name in ("prompts.parquet", "rejects.parquet", "summary.json")]
        prepare(PrepareParams(sources=[source]), *places)
    else:
        score = {"accuracy": 0.5, "ci_low": 0.4, "ci_high": 0.6, "n": rows}
        write_json(folder / "summary.json", {"base": score, "online": score})
        inputs = Inputs(folder / "summary.json", folder / "samples.parquet")
        report(read(ROOT / "params.yaml", Params), inputs, out / "page")
    peak, files = peak_mib(), sorted(file for file in out.rglob("*") if file.is_file())
    return peak, hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main() -> None:
    """Measure both, or one of them in its own process."""
    if sys.argv[1:2] in (["prepare"], ["report"]):
        what, folder, rows = sys.argv[1:]
        print(json.dumps(run(what, Path(folder), int(rows))))
        return
    rows, problems = [*map(int, sys.argv[1:]), *(50_000, 3_000)[len(sys.argv) - 1 :]]
    found = {}
    with tempfile.TemporaryDirectory() as place:
        write_problems(Path(place) / "problems.jsonl", rows)
        write_table(Path(place) / "samples.parquet", samples(rows, problems), "samples")
        for what in ("prepare", "report"):
            words = [sys.executable, __file__, what, place, str(rows)]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            peak, digest = json.loads(done.stdout.splitlines()[-1])
            found[what] = {"peak_mib": round(peak, 1), "outputs_sha256": digest}
    write_json(RESULT, {"rows": rows, "problems": problems, "stages": found})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
