"""The lines printed after a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from entrograd.cli.main import main
from entrograd.storage.files import read_json, write_json


@pytest.fixture
def results(tmp_path: Path) -> Path:
    entry = {"n": 512, "accuracy": 0.25, "ci_low": 0.2146, "ci_high": 0.2894}
    difference = {"diff": 0.5, "ci_low": 0.4512, "ci_high": 0.5488}
    summary = {"base": entry, "online": {**entry, "accuracy": 0.75}}
    write_json(tmp_path / "summary.json", {**summary, "online_minus_base": difference})
    write_json(tmp_path / "timings.json", {"prepare": 1.25, "train_online": 300.5})
    return tmp_path


def run(results: Path, *more: str) -> int:
    return main(
        ["summary", "--results", str(results), "--params", str(results / "params.yaml"), *more]
    )


def test_accuracies_times_and_the_reports_place(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "page.html").write_text("")
    assert run(results, "--report", str(results / "page.html")) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "greedy accuracy, 512 held-out problems interval",
        "base 25.0 % 21.5 – 28.9 %",
        "online 75.0 % 21.5 – 28.9 %",
        "online − base +50.0 points +45.1 to +54.9",
        "",
        "seconds when last run: 302 in all (train_online 300, prepare 1)",
        f"report: {results / 'page.html'}",
    ]


def test_an_interval_without_width_is_marked(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = read_json(results / "summary.json")
    summary["online_minus_base"] = {"diff": 1.0, "ci_low": 1.0, "ci_high": 1.0}
    write_json(results / "summary.json", summary)
    assert run(results) == 0
    out = capsys.readouterr().out
    assert "+100.0 to +100.0 *" in out
    assert "* without width an interval says nothing" in out


def test_what_is_absent_is_said(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "timings.json").unlink()
    write_json(results / "summary.json", {})
    assert run(results, "--report", "nowhere.html") == 0
    out = capsys.readouterr().out
    assert "no held-out accuracy" in out
    assert "nowhere.html is not there yet" in out
    assert "seconds" not in out


def test_no_summary_is_an_error_with_its_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 2
    assert "summary.json: no such file; stage score writes it" in capsys.readouterr().err


def test_imports_nothing_heavy(results: Path) -> None:
    """Nor does `entrograd --help`, which knows every command."""
    for words in (["--help"], ["summary", "--results", str(results)]):
        code = (
            "import sys; from entrograd.cli.main import main\n"
            f"try: main({words!r})\n"
            "except SystemExit: pass\n"
            "print([m for m in ('torch', 'prefect', 'dvc', 'transformers') if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]", words
