"""A self-contained page of the run: scores, training curves, data and samples."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # the code beside

from entrograd.pipeline.runner import Run, run_stage
from entrograd.pipeline.sections import Params

METRICS = ("summary", "benchmarks", "prepare", "annotate", "reward_heads")
INPUTS = {
    **{name: f"results/{name}.json" for name in METRICS},
    "samples": "data/samples",
    **{f"{kind}_curve": f"results/train_{kind}.csv" for kind in ("offline", "online")},
    "groups": "data/groups.parquet",
}


def work(run: Run) -> str:
    """The library call."""
    from entrograd.report.browser import Inputs, report

    given = {name: path for name, path in vars(run.paths).items() if name != "out"}
    return report(run.params, Inputs(**given), run.paths.out)


if __name__ == "__main__":
    sys.exit(
        run_stage(
            "report",
            work,
            doc=__doc__,
            params=Params,
            inputs=INPUTS,
            optional=set(INPUTS) - {"summary", "samples"},
            outputs={"out": "report"},
            reads_named=False,
        )
    )  # fmt: skip
