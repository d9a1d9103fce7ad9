"""Accuracies of the models from their stored samples, with intervals and differences.

The first model of the samples is the one the others are compared with. Nothing is sampled.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # the code beside

from entrograd.evaluate.params import ScoreStage
from entrograd.pipeline.runner import Run, run_stage


def work(run: Run) -> str:
    """The library call."""
    from entrograd.evaluate.score import score

    return score(run.params.score, **vars(run.paths))


if __name__ == "__main__":
    sys.exit(
        run_stage(
            "score",
            work,
            doc=__doc__,
            params=ScoreStage,
            inputs={"samples": "data/samples"},
            outputs={
                "summary": "results/summary.json",
                "benchmarks": "results/benchmarks.json",
            },
        )
    )
