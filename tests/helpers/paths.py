"""Where the checkout is."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "tests" / "params.yaml"  # valid parameters; those in ROOT are the user's
