"""Grade stored rollouts and add logprobs, token entropies, clusters and semantic entropy.

Any Parquet of the rollouts schema will do. Finished shards of an interrupted run are kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # the code beside

from entrograd.annotate.params import AnnotateStage
from entrograd.pipeline.runner import Run, run_stage


def work(run: Run) -> str:
    """The library call."""
    from entrograd.annotate.annotate import annotate

    return annotate(
        run.params.annotate, **vars(run.paths), resume=run.resume, part=run.options.shards
    )


if __name__ == "__main__":
    sys.exit(
        run_stage(
            "annotate",
            work,
            doc=__doc__,
            params=AnnotateStage,
            inputs={
                "model": "models/base",
                "prompts": "data/prompts.parquet",
                "rollouts": "data/rollouts",
            },
            outputs={
                "out": "data/annotated",
                "groups": "data/groups.parquet",
                "summary": "results/annotate.json",
                "reward_heads": "results/reward_heads.json",
            },
            options={"shards": "compute these shards alone (0-2,5) and keep them"},
        )
    )
