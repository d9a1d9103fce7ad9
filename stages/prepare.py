"""Turn sources into the prompts table: validated, deduplicated, split by content, decontaminated.

Section prepare: sources, prompt, heldout_fraction, max_reject_fraction, decontaminate.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # the code beside

from entrograd.data.params import PrepareStage
from entrograd.pipeline.runner import Run, run_stage


def work(run: Run) -> str:
    """The library call."""
    from entrograd.data.prepare import prepare

    return prepare(run.params.prepare, run.paths.out, run.paths.rejects, run.paths.summary)


if __name__ == "__main__":
    sys.exit(
        run_stage(
            "prepare",
            work,
            doc=__doc__,
            params=PrepareStage,
            inputs={},
            outputs={
                "out": "data/prompts.parquet",
                "rejects": "data/rejects.parquet",
                "summary": "results/prepare.json",
            },
        )
    )
