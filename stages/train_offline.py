"""Train on stored, annotated rollouts: several epochs, clipped importance ratios."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # the code beside

from entrograd.pipeline.runner import Run, run_stage
from entrograd.train.params import TrainOfflineStage


def work(run: Run) -> str:
    """The library call."""
    from entrograd.train.offline import train_offline

    paths, params = run.paths, run.params
    return train_offline(
        params.train_offline,
        params.method,
        paths.model,
        paths.annotated,
        paths.out,
        paths.curve,
        run.resume,
        reward_heads=paths.reward_heads,
    )


if __name__ == "__main__":
    sys.exit(
        run_stage(
            "train_offline",
            work,
            doc=__doc__,
            params=TrainOfflineStage,
            inputs={
                "model": "models/base",
                "annotated": "data/annotated",
                "reward_heads": "results/reward_heads.json",
            },
            optional=("reward_heads",),
            outputs={"out": "models/offline", "curve": "results/train_offline.csv"},
        )
    )
