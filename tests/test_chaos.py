"""Training killed at random instants ends with the bytes of the undisturbed run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from helpers.paths import ROOT

KILLS = 24


def test_killed_at_random_it_gives_the_same_bytes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "helpers.chaos", "--kills", str(KILLS), "--seed", "0"],
        cwd=ROOT / "tests",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] == KILLS
    assert counts["resumed"] >= 5
    assert counts["inside_a_checkpoint"] >= 1
    assert counts["finished"] >= 2
    assert counts["differing"] == []
