"""Annotated rows and groups, the stage on files, and its resumption after a kill."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from entrograd.annotate.clusters import by_answer
from entrograd.annotate.groups import GroupStatistics, annotate_groups
from entrograd.annotate.params import Alarms
from entrograd.annotate.summary import Summary, check_alarms, summarise_groups
from entrograd.data.groups import PromptGroup, groups_of
from entrograd.errors import InputError
from entrograd.models.load import load_model
from entrograd.rewards.verify.grade import STATUSES, Grader
from entrograd.storage.files import read_json
from entrograd.storage.hashing import sha256
from entrograd.storage.schemas import SCHEMAS
from entrograd.storage.tables import provenance, read_table, shard_name, write_manifest, write_table
from helpers.annotation import PROMPT_IDS, SETTINGS, Files, known, prompts_table, rollout

ROOT = Path(__file__).parent.parent


def fake_score(groups: Sequence[PromptGroup]) -> list[tuple[np.ndarray, np.ndarray]]:
    """logprob -(sample_index + 1) / 10 and entropy 0.5 + sample_index at every token."""
    return [
        (
            np.full(len(each), -(each.sample_index + 1) / 10, np.float32),
            np.full(len(each), 0.5 + each.sample_index, np.float32),
        )
        for group in groups
        for each in group.completions
    ]


def grouped(rows: Sequence[dict[str, Any]]) -> list[PromptGroup]:
    return groups_of(pa.Table.from_pylist(list(rows), SCHEMAS["rollouts"]), "here")


class TestRows:
    ROWS = (
        rollout("q", 3, "9"),
        rollout("p", 0, "12\n"),
        rollout("q", 0, "", completion_ids=[1]),
        rollout("q", 1, "7.0"),
        rollout("q", 2, "7"),
    )

    @pytest.fixture
    def result(self) -> tuple[list[PromptGroup], list[GroupStatistics]]:
        groups = grouped(self.ROWS)
        prompts = known({"p": ["12"], "q": ["7", "8"]})
        with Grader(SETTINGS.grader) as grader:
            return groups, annotate_groups(groups, prompts, fake_score, grader, by_answer, SETTINGS)

    def test_columns(self, result: tuple[list[PromptGroup], list[GroupStatistics]]) -> None:
        (q, p), _ = result
        assert [
            (group.prompt_id, r.sample_index, r.reward, r.reward_status, r.answer)
            for group in (q, p)
            for r in group.completions
        ] == [
            ("q", 3, 0.0, "ok", "9"),
            ("q", 0, 0.0, "no_answer", None),
            ("q", 1, 1.0, "ok", "7.0"),
            ("q", 2, 1.0, "ok", "7"),
            ("p", 0, 1.0, "ok", "12"),
        ]
        # By sample_index: q 0 (no answer) is 0, q 1 and q 2 are 1, q 3 is 2.
        assert [r.cluster_id for r in q.completions] == [2, 0, 1, 1]
        assert p.completions[0].cluster_id == 0
        assert p.completions[0].tokens["old_logprobs"].tolist() == pytest.approx([-0.1] * 3)
        assert q.completions[0].tokens["entropies"].tolist() == [3.5]

    def test_groups(self, result: tuple[list[PromptGroup], list[GroupStatistics]]) -> None:
        _, (q, p) = result
        assert (q.prompt_id, q.completions, q.clusters, q.mean_reward) == (
            "q",
            4,
            3,
            0.5,
        )
        # ell -.1 -.2 -.3 -.4, clusters 0 1 1 2: exp .904837 .818731 .740818 .670320, sum 3.134706;
        # masses .288651 .497510 .213838; -sum p ln p = .358660 + .347331 + .329853 = 1.035844
        assert q.semantic_entropy_rao == pytest.approx(1.035844, abs=1e-6)
        assert q.semantic_entropy_discrete == pytest.approx(1.0397208, abs=5e-8)
        # tokens: 1 of .5, 3 of 1.5 ("7.0"), 1 of 2.5, 1 of 3.5 -> 11 / 6
        assert q.mean_token_entropy == pytest.approx(11 / 6)
        assert (p.semantic_entropy_rao, p.clusters, p.mean_token_entropy) == (0.0, 1, 0.5)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([rollout("z", 0, "1")], "prompt_id z: no accepted answer"),
            ([rollout("p", 0, "1")] * 2, "prompt_id p, sample_index 0: appears twice"),
        ],
    )
    def test_bad_rows(self, rows: Sequence[dict[str, Any]], message: str) -> None:
        with Grader(SETTINGS.grader) as grader, pytest.raises(InputError, match=message):
            annotate_groups(
                grouped(rows), known({"p": ["1"]}), fake_score, grader, by_answer, SETTINGS
            )


# --- the stage -------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, tiny_model: Path) -> Files:
    return Files(tmp_path, tiny_model)


def test_tables_summary_and_provenance(files: Files, tmp_path: Path) -> None:
    line = files.run(tmp_path / "resume")
    out = tmp_path / "out"
    assert line == "24 completions of 6 prompts, mean reward 0.500, groups with signal 100%"
    rows = read_table(out / "annotated", "annotated").to_pylist()
    assert [row["cluster_id"] for row in rows[:4]] == [0, 1, 0, 2]
    assert provenance(out / "annotated")["sampling"]["temperature"] == 0.7
    assert provenance(out / "groups.parquet")["annotate"]["grader"].startswith("math-verify")
    assert read_table(out / "groups.parquet", "groups").num_rows == 6
    summary = read_json(out / "annotate.json")
    assert summary["status"] == {
        "ok": 1.0, "no_answer": 0.0, "timeout": 0.0, "truncated": 0.0, "error": 0.0
    }  # fmt: skip
    tokens = [value for row in rows for value in row["entropies"]]
    assert summary["mean_token_entropy"] == pytest.approx(sum(tokens) / len(tokens))


def test_logprobs_are_those_of_a_plain_forward_at_the_sampling_temperature(
    files: Files, tmp_path: Path
) -> None:
    import torch

    files.run(tmp_path / "resume")
    row = read_table(tmp_path / "out/annotated", "annotated").to_pylist()[2]
    model = load_model(files.model, "float32", "cpu")
    ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(PROMPT_IDS) - 1 : -1].double() / 0.7
    table = logits.log_softmax(-1)
    expected = [float(table[t, token]) for t, token in enumerate(row["completion_ids"])]
    entropies = [float(-(step.exp() * step).sum()) for step in table]
    assert row["old_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert row["entropies"] == pytest.approx(entropies, abs=1e-4)


def test_greedy_rollouts_and_foreign_files_are_scored_at_temperature_one(
    files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [rollout("p0", sample, text) for sample, text in enumerate(["12", "13"])]
    files.write(0, rows, temperature=0.0)
    greedy = files.rollouts = files.rollouts / shard_name(0)
    files.run(tmp_path / "a", "greedy")
    files.rollouts = tmp_path / "foreign.parquet"
    write_table(files.rollouts, read_table(greedy, "rollouts"), "rollouts")
    with caplog.at_level(logging.INFO, "entrograd"):
        files.run(tmp_path / "b", "foreign")
    assert "does not say how it was sampled" in caplog.text
    tables = [read_table(tmp_path / n / "annotated", "annotated") for n in ("greedy", "foreign")]
    assert tables[0].equals(tables[1])


def test_finished_shards_are_kept_and_nothing_left_means_no_model(
    files: Files, tmp_path: Path
) -> None:
    resume = tmp_path / "resume"
    files.run(resume)
    kept = (resume / "annotated" / shard_name(0)).stat()
    (resume / "annotated" / shard_name(1)).unlink()
    files.run(resume, "again")
    after = (resume / "annotated" / shard_name(0)).stat()
    assert (after.st_ino, after.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    assert sha256(tmp_path / "again") == sha256(tmp_path / "out")
    files.model = tmp_path / "no model"
    files.run(resume, "third")
    assert sha256(tmp_path / "third") == sha256(tmp_path / "out")


def _unknown(files: Files) -> None:
    prompts_table(files.prompts, {"p0": ["12"]})


def _split_group(files: Files) -> None:
    files.write(1, [rollout("p0", 9, "12")])
    write_manifest(files.rollouts)


def _empty(files: Files) -> None:
    files.rollouts = files.rollouts.parent / "empty.parquet"
    write_table(files.rollouts, [], "rollouts")


def _too_long(files: Files) -> None:
    files.write(0, [rollout("p0", 0, "1" * 300)])
    write_manifest(files.rollouts)


def _foreign_token(files: Files) -> None:
    files.write(0, [rollout("p0", 0, "12", completion_ids=[9999])])
    write_manifest(files.rollouts)


def _no_column(files: Files) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files.rollouts = files.rollouts.parent / "other.parquet"
    pq.write_table(pa.table({"text": ["12"]}), files.rollouts)


def _not_parquet(files: Files) -> None:
    files.rollouts = files.rollouts.parent / "rollouts.jsonl"
    files.rollouts.write_text("{}\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_unknown, r"shard-00000.parquet: prompt_id p1 is not in .*prompts.parquet"),
        (_split_group, "prompt_id p0 is also in shard-00000.parquet"),
        (_empty, "empty.parquet: no rows"),
        (_too_long, "shard-00000.*prompt_id p0, sample_index 0: 303 tokens do not fit"),
        (_foreign_token, "token 9999 is not in the vocabulary"),
        (_no_column, "other.parquet: column prompt_id .* is missing"),
        (_not_parquet, "rollouts.jsonl: not a Parquet file"),
    ],
)
def test_bad_input(
    files: Files, tmp_path: Path, spoil: Callable[[Files], None], message: str
) -> None:
    spoil(files)
    with pytest.raises(InputError, match=message):
        files.run(tmp_path / "resume")
    assert not (tmp_path / "out").exists()


class TestAlarms:
    SUMMARY: Summary = {  # noqa: RUF012
        "completions": 100,
        "groups": 10,
        "mean_semantic_entropy": 0.5,
        "mean_reward": 0.0,
        "groups_with_signal": 0.5,
        "mean_token_entropy": 0.5,
        "status": {"ok": 0.1, "no_answer": 0.6, "truncated": 0.1, "timeout": 0.1, "error": 0.1},
    }

    def test_warnings(self, caplog: pytest.LogCaptureFixture) -> None:
        assert check_alarms({**self.SUMMARY, "groups_with_signal": 0.0}, Alarms()) == 4
        assert [record.getMessage().split(";")[0] for record in caplog.records] == [
            "60.0% of 100 completions are no_answer",
            "10.0% of 100 completions are timeout",
            "100.0% of groups have equal rewards (mean 0.000)",
            "10.0% of completions could not be compared (reward 0)",
        ]

    @pytest.mark.parametrize("status", ["no_answer", "truncated", "timeout"])
    def test_stop(self, status: str) -> None:
        alarms = Alarms.model_validate({f"{status}_stop": 0.05})
        with pytest.raises(InputError, match=rf"annotate.alarms.{status}_stop allows \(5.0%\)"):
            check_alarms(self.SUMMARY, alarms)

    def test_a_collapsed_entropy(self, caplog: pytest.LogCaptureFixture) -> None:
        summary: Summary = {**self.SUMMARY, "status": dict.fromkeys(STATUSES, 0.0)}
        assert check_alarms(summary, Alarms()) == 0
        summary["mean_token_entropy"] = 0.01
        assert check_alarms(summary, Alarms(), "round 7") == 1
        assert caplog.messages[0].startswith("round 7: the mean token entropy is 0.01 nats; ")
        with pytest.raises(
            InputError, match=r"round 7: .* less than .*entropy_stop .*\(0.02 nats\)"
        ):
            check_alarms(summary, Alarms(entropy_stop=0.02), "round 7")

    def test_equal_rewards(self) -> None:
        with pytest.raises(
            InputError, match=r"50.0% of groups have equal .*no_signal_stop .*40.0%"
        ):
            check_alarms(self.SUMMARY, Alarms(no_signal_stop=0.4))

    def test_groups_are_summed_up_as_shards_are(self, files: Files, tmp_path: Path) -> None:
        files.run(tmp_path / "resume")
        out = files.folder / "out"
        groups = groups_of(read_table(out / "annotated", "annotated"), "annotated")
        rows = read_table(out / "groups.parquet", "groups").to_pylist()
        statistics = [GroupStatistics(**row) for row in rows]
        assert summarise_groups(groups, statistics) == read_json(out / "annotate.json")

    def test_the_stage_stops_before_writing(self, files: Files, tmp_path: Path) -> None:
        files.write(0, [rollout("p0", 0, "I\nam\nlost")])
        files.rollouts = files.rollouts / shard_name(0)
        settings = SETTINGS.model_copy(update={"alarms": Alarms(no_answer_stop=0.5)})
        with pytest.raises(InputError, match="no_answer_stop"):
            files.run(tmp_path / "resume", settings=settings)
        assert not (tmp_path / "out").exists()


# --- the command, killed ---------------------------------------------------------------------

PARAMS = """
base_model: {reference: "path:unused"}
prepare: {sources: [{kind: file, path: unused}]}
rollout: {}
annotate: {dtype: float32}
execution: {annotate: {device: cpu}}
method: {name: grpo}
train_offline: {}
train_online: {}
evaluate: {}
score: {}
report: {}
"""


def command(files: Files, place: Path) -> list[str]:
    place.mkdir()
    (place / "params.yaml").write_text(PARAMS)
    paths = {
        "model": files.model,
        "prompts": files.prompts,
        "rollouts": files.rollouts,
        "out": place / "out" / "annotated",
        "groups": place / "out" / "groups.parquet",
        "summary": place / "out" / "annotate.json",
        "reward-heads": place / "out" / "reward_heads.json",
        "params": place / "params.yaml",
        "work": place / "work",
        "timings": place / "timings.json",
    }
    arguments = [part for key, path in paths.items() for part in (f"--{key}", str(path))]
    return [sys.executable, str(ROOT / "stages" / "annotate.py"), *arguments]


OUTPUTS = ("annotated", "groups.parquet", "annotate.json", "reward_heads.json")


def outputs(place: Path) -> dict[str, str]:
    return {name: sha256(place / "out" / name) for name in OUTPUTS}


def test_killed_and_run_again_gives_the_same_files(tmp_path: Path, tiny_model: Path) -> None:
    files = Files(tmp_path, tiny_model, shards=4)
    # The second shard needs a grading worker, so the kill finds the stage in the middle of it.
    files.write(1, [rollout("p2", i, t) for i, t in enumerate([r"\boxed{\sqrt{144}}", "13\n"])])
    write_manifest(files.rollouts)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(files, whole), check=True, capture_output=True, cwd=ROOT)
    arguments = command(files, killed)
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL)
    pattern = f"work/annotate-*/annotated/{shard_name(0)}"
    while not (first := list(killed.glob(pattern))) and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    there = {path.name for path in (killed / "out").iterdir()}  # what the run means to write
    assert there == {f"{name}.run.json" for name in OUTPUTS}
    before = first[0].stat()
    again = subprocess.run(arguments, check=True, capture_output=True, text=True, cwd=ROOT)
    assert "1 of 4 shards were finished before" in again.stderr
    # The finished shard is the very file that the interrupted run wrote (linked into place).
    after = (killed / "out" / "annotated" / shard_name(0)).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert outputs(killed) == outputs(whole)
    summary = json.loads((killed / "out" / "annotate.json").read_text())
    assert (summary["groups"], summary["status"]["ok"]) == (7, 1.0)
