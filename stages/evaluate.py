"""Sample and grade: greedily on the held-out split, and on the benchmarks params.yaml names.

Stage score reads the samples; the first --model is the one it compares the others with.
--prompts '' leaves the held-out split out and evaluates benchmarks alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # the code beside

from entrograd.evaluate.params import EvaluateStage
from entrograd.pipeline.runner import Run, run_stage


def work(run: Run) -> str:
    """The library call."""
    from entrograd.evaluate.evaluate import evaluate

    paths = vars(run.paths)
    models = paths.pop("model")
    return evaluate(run.params.evaluate, models, **paths, resume=run.resume)


if __name__ == "__main__":
    models = {name: f"models/{name}" for name in ("base", "offline", "online")}
    sys.exit(
        run_stage(
            "evaluate",
            work,
            doc=__doc__,
            params=EvaluateStage,
            inputs={"model": models, "prompts": "data/prompts.parquet"},
            optional=("prompts",),
            outputs={"samples": "data/samples"},
        )
    )
