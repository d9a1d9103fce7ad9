"""A self-contained page of the run: scores, training curves, data and samples."""

import sys

from entrograd.stage import Run, run_stage

OPTIONAL = ("benchmarks", "offline_curve", "online_curve", "groups", "prepare", "annotate")


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
            inputs={
                "summary": "results/summary.json",
                "samples": "data/samples",
                "benchmarks": "results/benchmarks.json",
                "offline_curve": "results/train_offline.csv",
                "online_curve": "results/train_online.csv",
                "groups": "data/groups.parquet",
                "prepare": "results/prepare.json",
                "annotate": "results/annotate.json",
            },
            optional=OPTIONAL,
            outputs={"out": "report"},
        )
    )
