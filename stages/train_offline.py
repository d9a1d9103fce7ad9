"""Train on stored, annotated rollouts: several epochs, clipped importance ratios."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # the code beside

from entrograd.pipeline.runner import Run, run_stage
from entrograd.train.params import TrainOfflineStage


def work(run: Run) -> str:
    """The library call."""
    from entrograd.methods.resolved import check_resolved
    from entrograd.train.offline import train_offline

    paths = vars(run.paths)
    if method := paths.pop("method"):
        check_resolved(run.params.method, method)
    return train_offline(run.params.train_offline, run.params.method, **paths, resume=run.resume)


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
                "method": "",
            },
            optional=("reward_heads", "method"),
            outputs={"out": "models/offline", "curve": "results/train_offline.csv"},
        )
    )
