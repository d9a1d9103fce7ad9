"""The queries of docs/annotation.md run, as they stand, on a small annotated table."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from entrograd.annotate.annotate import annotate
from entrograd.annotate.params import AnnotateParams
from entrograd.rewards.params import Head
from entrograd.storage.tables import write_table

DOCS = Path(__file__).parent.parent / "docs" / "annotation.md"
SECTION = DOCS.read_text(encoding="utf-8").split("\n## Queries\n")[1].split("\n## ")[0]
QUERIES = re.findall(r"```(sql|python)\n(.*?)```", SECTION, re.DOTALL)
HEADS = ("format", "steps")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder as the documentation has it: models/base, and data with the tables."""
    place = tmp_path_factory.mktemp("queries")
    (place / "models").mkdir()
    (place / "models" / "base").symlink_to(tiny_model)
    data = place / "data"
    problems = {"p0": "12", "p1": "7", "p2": "3"}
    rows = [
        {
            "prompt_id": name,
            "source": "s",
            "split": "train",
            "problem": f"what is {answer}?",
            "answers": [answer],
            "prompt_text": f"{answer} = ",
        }
        for name, answer in problems.items()
    ]
    write_table(data / "prompts.parquet", rows, "prompts")
    texts = ["It is 12", "12", "so 7. so 7. so 7.", "7", "1\n2", r"\boxed{3}"]
    names = [name for name in problems for _ in texts]
    table = pa.table({"prompt_id": names, "completion_text": texts * len(problems)})
    pq.write_table(table, data / "completions.parquet")
    annotate(
        AnnotateParams(dtype="float32", device="cpu", heads={name: Head() for name in HEADS}),
        prompts=data / "prompts.parquet",
        rollouts=data / "completions.parquet",
        model=tiny_model,
        out=data / "annotated",
        groups=data / "groups.parquet",
        summary=data / "annotate.json",
        reward_heads=data / "reward_heads.json",
        resume=place / "resume",
    )
    return place


def test_five_queries_are_documented() -> None:
    assert [language for language, _ in QUERIES] == ["sql", "sql", "python", "sql", "sql"]


@pytest.mark.parametrize(("language", "text"), QUERIES)
def test_query(
    language: str,
    text: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    if language == "python":
        exec(text, {})
        assert len(capsys.readouterr().out.splitlines()) == 8
        return
    import duckdb

    done = duckdb.connect().execute(text)
    columns = [name for name, *_ in done.description]
    found = [dict(zip(columns, row, strict=True)) for row in done.fetchall()]
    assert found
    if "prompts" in columns:
        assert sum(row["prompts"] for row in found) == 3
    if "completions" in columns:
        assert sum(row["completions"] for row in found) == 18
    if "tokens" in columns:
        assert [row["correct"] for row in found] == [False, True]
    if "head" in columns:
        assert [row["head"] for row in found] == sorted((*HEADS, "correct"))
        with_itself = {row["head"]: row[row["head"]] for row in found}
        assert with_itself["format"] == with_itself["correct"] == 1.0
