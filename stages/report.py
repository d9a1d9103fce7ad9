"""A self-contained page of the run: scores, training curves, data and samples."""

import sys

from entrograd.stage import Run, run_stage

INPUTS = {
    "summary": "results/summary.json",
    "samples": "data/samples",
    "benchmarks": "results/benchmarks.json",
    "offline_curve": "results/train_offline.csv",
    "online_curve": "results/train_online.csv",
    "groups": "data/groups.parquet",
    "prepare": "results/prepare.json",
    "annotate": "results/annotate.json",
    "reward_heads": "results/reward_heads.json",
}


def work(run: Run) -> str:
    """The library call."""
    from entrograd.report.browser import Inputs, report

    given = {name: path for name, path in vars(run.paths).items() if name != "out"}
    confidence = run.params.evaluate.confidence
    return report(run.params.report, Inputs(**given), run.paths.out, confidence)


if __name__ == "__main__":
    sys.exit(
        run_stage(
            "report",
            work,
            doc=__doc__,
            sections=("report", "evaluate"),
            inputs=INPUTS,
            optional=set(INPUTS) - {"summary", "samples"},
            outputs={"out": "report"},
        )
    )
