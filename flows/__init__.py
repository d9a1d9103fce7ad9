"""Prefect over the DVC pipeline: when a stage runs, where, and what happened. DVC alone decides
what has to be computed. Imports neither torch nor entrograd."""

import os
import sys
from pathlib import Path

# A worker that loads flows/pipeline.py as a script puts this folder first on the path, where
# flows/dvc.py would stand in for DVC itself.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _HERE]

ROOT = Path(os.environ.get("PIPELINE_ROOT") or Path.cwd()).absolute()
"""The checkout whose pipeline runs: PIPELINE_ROOT, else the current folder."""

# Prefect reads its settings while it is imported, so this comes first. Its home stays inside the
# checkout, it sends nothing anywhere, and what a user has set is kept.
for _key, _value in {
    "PREFECT_HOME": str(ROOT / ".prefect"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
}.items():
    os.environ.setdefault(_key, _value)
