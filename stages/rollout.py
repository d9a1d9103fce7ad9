"""Sample a group of completions for each training prompt into Parquet shards.

Finished shards of an interrupted run are kept; what is drawn does not depend on the shards.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # the code beside

from entrograd.pipeline.runner import Run, run_stage
from entrograd.rollout.params import RolloutStage


def work(run: Run) -> str:
    """The library call."""
    from entrograd.rollout.rollout import rollout

    return rollout(
        run.params.rollout, **vars(run.paths), resume=run.resume, part=run.options.shards
    )


if __name__ == "__main__":
    sys.exit(
        run_stage(
            "rollout",
            work,
            doc=__doc__,
            params=RolloutStage,
            inputs={"model": "models/base", "prompts": "data/prompts.parquet"},
            outputs={"out": "data/rollouts"},
            options={"shards": "compute these shards alone (0-2,5) and keep them"},
        )
    )
