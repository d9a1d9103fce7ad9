"""Fixtures every test may use: a tiny random language model with a character tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import helpers.environment  # noqa: F401 - before torch

# Two files run beside each other: threads of one would only wait for those of the other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from helpers.paths import ROOT
from helpers.tiny_model import write_tiny_model

# Files that start processes or train again and again: `make test-fast` leaves them out.
SLOW = {
    *("annotate_clusters", "annotate_stage", "benchmarks", "chaos", "checkpoint", "evaluate"),
    *("exactness", "extras", "flows", "flows_prefect", "lora", "overlap", "pipeline"),
    *("prepare_stage", "processes", "queries", "report", "rerun", "resolve", "resume", "rollout"),
    *("shards", "verify_agreement", "verify_fuzz", "verify_grade", "verify_kinds", "verify_rows"),
    *("verify_values", "vllm", "vllm_http"),
}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without the slow tests their files are not even imported: DVC, Prefect and Ray take long."""
    slow = collection_path.stem.removeprefix("test_") in SLOW
    return True if slow and config.option.markexpr == "not slow" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest goes first: nobody waits for it alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model; read only."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout. Where CI is set it must be there."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{folder} is absent; tests on real data need it")
        pytest.skip(f"{folder} is absent")
    return folder
