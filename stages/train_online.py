"""Train on completions the model draws itself: rollout, grade, annotate, update, each step."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # the code beside

from entrograd.pipeline.runner import Run, run_stage
from entrograd.train.params import TrainOnlineStage


def work(run: Run) -> str:
    """The library call."""
    from entrograd.methods.resolved import check_resolved
    from entrograd.train.online import train_online

    paths = vars(run.paths)
    if method := paths.pop("method"):
        check_resolved(run.params.method, method)
    return train_online(run.params, **paths, resume=run.resume)


if __name__ == "__main__":
    sys.exit(
        run_stage(
            "train_online",
            work,
            doc=__doc__,
            params=TrainOnlineStage,
            inputs={
                "model": "models/offline",
                "prompts": "data/prompts.parquet",
                "reward_heads": "results/reward_heads.json",
                "method": "",
            },
            optional=("reward_heads", "method"),
            outputs={
                "out": "models/online",
                "rounds": "data/online",
                "curve": "results/train_online.csv",
            },
        )
    )
