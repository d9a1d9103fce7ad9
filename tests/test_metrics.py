"""The registry of metrics, the curve that grows, and the two names of what was drawn and trained
on."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from entrograd.cli.metrics_page import document
from entrograd.storage.files import write_csv
from entrograd.storage.metrics import METRICS, OF_BATCH, PLACES, ROUND, SPEED, UPDATE, ordered
from entrograd.train.curve import Curve, Row, Stopwatch, online_row
from helpers.paths import ROOT


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_metric_is_there_once_with_a_meaning() -> None:
    registered = (*PLACES, *ROUND, *UPDATE, *SPEED)
    assert len(METRICS) == len(registered)
    assert all(one.label and one.meaning.endswith(".") for one in registered)


def test_the_page_is_what_the_registry_says() -> None:
    """`python -m entrograd.cli.metrics_page` writes it."""
    assert (ROOT / "docs/metrics.md").read_text() == document()


def test_order_is_the_registrys_and_a_name_that_is_none_is_an_error() -> None:
    names = ["loss", "weight_format", "reward_mean", "round", "weight_brevity", "loss"]
    expected = ["round", "reward_mean", "loss", "weight_format", "weight_brevity"]
    assert ordered(names) == expected
    with pytest.raises(KeyError, match="los"):
        ordered(["los"])


ROWS: list[Row] = [
    {"round": 1, "update": 1, "reward_mean": 0.25, "loss": 0.1 + 0.2},
    {"round": 1, "update": 2, "loss": -1e-17},
    {"round": 2, "update": 3, "reward_mean": 0.5, "loss": 0.0, "heldout_accuracy": 0.75},
    {"round": 2, "update": 4, "loss": 1.0},
]


class TestCurve:
    def test_is_whole_after_every_row(self, tmp_path: Path) -> None:
        curve = Curve(tmp_path / "curve.csv", [])
        for count, row in enumerate(ROWS, start=1):
            curve.add(row)
            found = read(curve.path)
            assert len(found) == count
            assert [r["loss"] for r in found] == [str(r["loss"]) for r in ROWS[:count]]
        assert found[0]["heldout_accuracy"] == ""
        assert list(found[0]) == ["round", "update", "reward_mean", "heldout_accuracy", "loss"]

    @pytest.mark.parametrize("done", range(5))
    def test_a_run_that_is_continued_gives_the_same_bytes(self, tmp_path: Path, done: int) -> None:
        """The killed run's file has rows past its checkpoint, and half a line."""
        whole = Curve(tmp_path / "whole.csv", [])
        for row in ROWS:
            whole.add(row)
        path = tmp_path / "curve.csv"
        path.write_bytes((tmp_path / "whole.csv").read_bytes() + b"3,")
        continued = Curve(path, ROWS[:done])
        assert len(read(path) if done else []) == done
        for row in ROWS[done:]:
            continued.add(row)
        assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes()
        continued.write(tmp_path / "out.csv")
        assert (tmp_path / "out.csv").read_bytes() == path.read_bytes()

    def test_ends_are_of_the_rows_with_a_value(self, tmp_path: Path) -> None:
        curve = Curve(tmp_path / "curve.csv", list(ROWS))
        assert curve.ends("reward_mean") == (0.25, 0.5)
        assert curve.newest("reward_mean") == 0.5
        assert all(map(math.isnan, curve.ends("kl")))

    def test_beside_the_first_process_there_is_no_file(self, tmp_path: Path) -> None:
        curve = Curve(tmp_path / "curve.csv", [], writes=False)
        curve.add(ROWS[0])
        assert (curve.rows, list(tmp_path.iterdir())) == ([ROWS[0]], [])


def test_drawn_and_batch_figures_have_two_names() -> None:
    drawn = {"reward_mean": 0.25, "semantic_entropy": 1.0, "alarms": 0.0}
    trained = {"loss": 0.5, "reward_mean": 0.5, "semantic_entropy": 2.0}
    row = online_row(3, 7, 2, drawn, trained)
    assert row == {
        **{"round": 3, "update": 7, "epoch": 2},
        **drawn,
        **{"loss": 0.5, "batch_reward_mean": 0.5, "batch_semantic_entropy": 2.0},
    }
    assert {name: f"batch_{name}" for name in ("reward_mean", "semantic_entropy")} == OF_BATCH


class TestStopwatch:
    def test_a_row_per_update_and_a_continued_run_keeps_those_of_its_checkpoint(
        self, tmp_path: Path
    ) -> None:
        first = Stopwatch(tmp_path, 0)
        for update in (1, 2, 3):
            with first.phase("update"), first.phase("sample"):
                pass
            first.lap(10 * update, update=update)
        second = Stopwatch(tmp_path, 2)
        with second.phase("checkpoint"):
            pass
        second.lap(99, update=3)
        second.write(tmp_path / "train_online.csv")
        rows = read(tmp_path / "train_online.speed.csv")
        assert [(row["update"], row["tokens"]) for row in rows] == [
            ("1", "10"),
            ("2", "20"),
            ("3", "99"),
        ]
        assert set(rows[0]) <= set(METRICS)
        assert all(float(row["peak_memory"]) > 1 for row in rows)
        assert rows[2]["seconds_update"] == "" != rows[2]["seconds_checkpoint"]

    def test_a_line_that_was_cut_off_is_none(self, tmp_path: Path) -> None:
        write_csv(tmp_path / "speed.csv", [{"update": 1, "seconds": 0.5, "tokens": 3}])
        with (tmp_path / "speed.csv").open("a") as file:
            file.write("2,0.")
        Stopwatch(tmp_path, 2).write(tmp_path / "c.csv")
        assert [row["update"] for row in read(tmp_path / "c.speed.csv")] == ["1"]
