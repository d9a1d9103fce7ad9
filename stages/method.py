"""Write what section method stands for: its four components, their parameters and their code.

Training depends on this file: editing a component that the run does not use trains nothing again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # the code beside

from entrograd.methods.params import MethodStage
from entrograd.pipeline.runner import Run, run_stage


def work(run: Run) -> str:
    """The library call."""
    from entrograd.methods.resolved import resolve

    return resolve(run.params.method, run.paths.out)


if __name__ == "__main__":
    sys.exit(
        run_stage(
            "method",
            work,
            doc=__doc__,
            params=MethodStage,
            inputs={},
            outputs={"out": "data/method.json"},
        )
    )
