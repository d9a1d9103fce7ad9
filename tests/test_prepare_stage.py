"""The prepare and base_model stages as a user runs them: files in, files out, errors in a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from entrograd.data.params import PrepareParams
from entrograd.data.prepare import prepare
from entrograd.data.split import split
from entrograd.errors import InputError
from entrograd.params import check
from entrograd.storage.files import read_json
from entrograd.storage.hashing import sha256
from entrograd.storage.tables import read_table

ROOT = Path(__file__).parent.parent
FEW_SHOT = {
    "style": "few_shot",
    "template": "{problem} = {answer}\n",
    "examples": [{"problem": "1 + 1", "answer": "2"}],
}
WORDS = "a baker sells some fresh loaves of bread to each of the hungry people in town on day"


def write_jsonl(path: Path, records: list[Any]) -> str:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def run(folder: Path, section: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """prepare with files under `folder`; (prompts, summary)."""
    paths = [folder / name for name in ("prompts.parquet", "rejects.parquet", "summary.json")]
    prepare(check(PrepareParams, section, "prepare"), *paths)
    return read_table(paths[0], "prompts").to_pylist(), read_json(paths[2])


def sums(count: int) -> list[dict[str, Any]]:
    return [{"problem": f"{i} + {i * 3}", "answer": str(i * 4)} for i in range(10, 10 + count)]


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    good = sums(100)
    leaked = {"problem": f"{WORDS} 7 and we ask how many?", "answer": "1"}
    records = [
        *good,
        {"problem": "11+33", "answer": "44"},  # duplicate of the second
        {"problem": "1 + 1", "answer": "2"},  # the few-shot example
        leaked,
        {"problem": "5 + 5"},  # no answer
        "{",
        {"problem": "2 + 2", "answer": "4"},
        {"problem": "2+2", "answer": "5"},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    bench = write_jsonl(tmp_path / "bench.jsonl", [{"problem": f"{WORDS} 7 and we ask what?"}])
    section = {
        "sources": [{"kind": "file", "path": source}],
        "prompt": FEW_SHOT,
        "heldout_fraction": 0.2,
        "max_reject_fraction": 0.05,
        "decontaminate": {"benchmarks": [bench]},
    }
    prompts, summary = run(tmp_path, section)
    heldout = [r["problem"] for r in good if split(r["problem"], 0.2) == "heldout"]
    assert split(leaked["problem"], 0.2) == "train"
    assert summary["total"] == {
        "rows": 107,
        "rejected": 4,
        "duplicates": 1,
        "few_shot_examples": 1,
        "overlapping": 1,
        "heldout": len(heldout),
        "train": 100 - len(heldout),
    }
    assert summary["sources"] == {"a.jsonl": summary["total"]}
    assert summary["reject_reasons"] == {
        "missing answer": 1,
        "malformed JSON": 1,
        "conflicting answers": 2,
    }
    assert summary["overlap"]["by_benchmark"]["bench"]["ngram"] == 1
    assert summary["overlap"]["examples"][0]["train_row"] == "a.jsonl row 103"
    assert [r["problem"] for r in prompts] == [r["problem"] for r in good]  # in source order
    assert [r["problem"] for r in prompts if r["split"] == "heldout"] == heldout
    assert prompts[0]["prompt_text"] == "1 + 1 = 2\n10 + 30 = "
    assert prompts[0]["messages"] is None
    assert len({r["prompt_id"] for r in prompts}) == 100
    rejects = read_table(tmp_path / "rejects.parquet", "rejects").to_pylist()
    assert [(r["row"], r["reason"]) for r in rejects] == [
        (104, "missing answer"),
        (105, "malformed JSON"),
        (106, "conflicting answers"),
        (107, "conflicting answers"),
    ]


def test_more_data_never_moves_an_old_row(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", sums(60))
    more = write_jsonl(tmp_path / "b.jsonl", sums(200)[::-1])
    section: dict[str, Any] = {
        "sources": [{"kind": "file", "path": first}],
        "heldout_fraction": 0.3,
    }
    before = {r["prompt_id"]: r["split"] for r in run(tmp_path, section)[0]}
    section["sources"].insert(0, {"kind": "file", "path": more})
    after = {r["prompt_id"]: r["split"] for r in run(tmp_path, section)[0]}
    assert len(before) == 60
    assert len(after) == 200
    assert before.items() <= after.items()
    assert set(before.values()) == {"train", "heldout"}


def test_training_rows_near_a_heldout_one_are_removed(tmp_path: Path) -> None:
    records = [{"problem": f"{WORDS} {i} says rule {i}", "answer": str(i)} for i in range(12)]
    source = write_jsonl(tmp_path / "a.jsonl", [*records, *sums(20)])
    held = {r["problem"] for r in records if split(r["problem"], 0.3) == "heldout"}
    assert 0 < len(held) < 12
    section = {"sources": [{"kind": "file", "path": source}], "heldout_fraction": 0.3}
    prompts, summary = run(tmp_path, section)
    kept = {r["problem"] for r in prompts if r["problem"].startswith(WORDS)}
    assert kept == held
    assert summary["overlap"]["by_benchmark"]["heldout split"]["ngram"] == 12 - len(held)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", sums(50))
    section = {"sources": [{"kind": "file", "path": source}] * 2}
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run(tmp_path / name, section)
        made.append(sha256(tmp_path / name))
    assert made[0] == made[1]
    summary = read_json(tmp_path / "one" / "summary.json")
    assert summary["sources"]["a.jsonl#2"]["duplicates"] == 50
    assert str(tmp_path) not in (tmp_path / "one" / "summary.json").read_text()


def test_too_many_rejects_stop_the_stage_with_an_example(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*sums(50), '{"problem": "9 + 9"}', "{oops"])
    section = {"sources": [{"kind": "file", "path": source}], "max_reject_fraction": 0.03}
    with pytest.raises(InputError) as caught:
        run(tmp_path, section)
    message = str(caught.value)
    assert "2 of 52 rows are rejected, above prepare.max_reject_fraction 0.03" in message
    assert 'missing answer (1; a.jsonl row 51: \'{"problem": "9 + 9"}\')' in message
    assert "malformed JSON (1; a.jsonl row 52: '{oops')" in message
    assert not list(tmp_path.glob("*.parquet"))
    assert not list(tmp_path.glob("*.json"))


def test_the_line_of_a_csv_row_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    lines = [f"{i} + 1,{i + 1}" for i in range(50)]
    path.write_text("\n".join(["problem,answer", *lines, "9 + 9", "1+1,3", ""]))
    section: dict[str, Any] = {"sources": [{"kind": "file", "path": str(path)}]}
    with pytest.raises(InputError, match=r"1 fields, expected 2 \(1; a\.csv row 51 \(line 52\): "):
        run(tmp_path, {**section, "max_reject_fraction": 0.01})
    run(tmp_path, {**section, "max_reject_fraction": 0.5})
    rejects = read_table(tmp_path / "rejects.parquet", "rejects").to_pylist()
    assert [(r["row"], r["line"]) for r in rejects] == [(51, 52), (2, 3), (52, 53)]
    assert rejects[1]["content"] == "1 + 1 -> 2, but 3 in a.csv row 52 (line 53)"


def test_an_empty_benchmark_guards_against_nothing(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", sums(20))
    (tmp_path / "bench.csv").write_text("problem,answer\n")
    section = {
        "sources": [{"kind": "file", "path": source}],
        "decontaminate": {"benchmarks": [str(tmp_path / "bench.csv")]},
    }
    with pytest.raises(InputError, match=r"bench\.csv: no rows"):
        run(tmp_path, section)


def test_a_benchmark_problem_within_a_longer_row_is_removed(tmp_path: Path) -> None:
    bench = [{"problem": f"{WORDS} 7 and we ask what?"}, {"problem": "Find the sum of 3 and 4."}]
    leaked = [
        " ".join([*(f"filler{i}" for i in range(80)), bench[0]["problem"]]),
        f"Solve the following problem. {bench[1]['problem']}",
    ]
    records = [*sums(20), *({"problem": problem, "answer": "1"} for problem in leaked)]
    section = {
        "sources": [{"kind": "file", "path": write_jsonl(tmp_path / "a.jsonl", records)}],
        "heldout_fraction": 0.0,
        "decontaminate": {"benchmarks": [write_jsonl(tmp_path / "bench.jsonl", bench)]},
    }
    prompts, summary = run(tmp_path, section)
    assert [r["problem"] for r in prompts] == [r["problem"] for r in sums(20)]
    assert summary["overlap"]["by_benchmark"]["bench"]["rows"] == 2
    assert [(e["kind"], e["benchmark_row"]) for e in summary["overlap"]["examples"]] == [
        ("benchmark_ngram", 1),
        ("contains", 2),
    ]


def test_no_training_prompt_left(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", sums(5))
    section = {"sources": [{"kind": "file", "path": source}], "heldout_fraction": 1.0}
    with pytest.raises(InputError, match="no training prompts are left of 5 rows"):
        run(tmp_path, section)


# --- as commands -----------------------------------------------------------------------------


def write_params(folder: Path, **sections: Any) -> None:
    path = write_jsonl(folder / "a.jsonl", sums(30))
    names = ["rollout", "annotate", "train_offline", "train_online", "evaluate", "score", "report"]
    whole: dict[str, Any] = {name: {} for name in names}
    whole |= {"method": {"name": "grpo"}, "base_model": {"reference": "path:model"}}
    whole["prepare"] = {"sources": [{"kind": "file", "path": path}]}
    (folder / "params.yaml").write_text(yaml.safe_dump({**whole, **sections}))


def stage(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "stages" / f"{name}.py"), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_stage_prepare(tmp_path: Path) -> None:
    write_params(tmp_path)
    done = stage("prepare", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "of 30 rows; 0 rejected" in done.stdout
    for name in ("data/prompts.parquet", "data/rejects.parquet", "results/prepare.json"):
        manifest = read_json(tmp_path / f"{name}.run.json")
        assert manifest["output_sha256"] == sha256(tmp_path / name)
    assert read_table(tmp_path / "data" / "rejects.parquet", "rejects").num_rows == 0


def test_stage_prepare_on_bad_input(tmp_path: Path) -> None:
    write_params(tmp_path, prepare={"sources": [{"kind": "file", "path": "none.jsonl"}]})
    done = stage("prepare", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "prepare: error: none.jsonl: no such file"
    write_params(tmp_path)
    (tmp_path / "file").touch()
    done = stage("prepare", tmp_path, "--out", "file/prompts.parquet")
    assert done.returncode == 2
    assert "file/prompts.parquet: cannot be written" in done.stderr
    assert not (tmp_path / "results" / "prepare.json").exists()


def test_stage_base_model(tmp_path: Path, tiny_model: Path) -> None:
    write_params(tmp_path, base_model={"reference": f"path:{tiny_model}"})
    done = stage("base_model", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("base_model: llama, ")
    assert (tmp_path / "models" / "base" / "model.safetensors").is_file()
