"""docs/metrics.md: `python -m entrograd.cli.metrics_page` writes it from the registry."""

from __future__ import annotations

import sys
from pathlib import Path

from entrograd.storage.files import write_text
from entrograd.storage.metrics import PLACES, ROUND, SPEED, UPDATE

PAGE = Path("docs/metrics.md")


def document() -> str:
    """docs/metrics.md."""
    parts = [_HEAD]
    for title, text, metrics in _TABLES:
        parts += [
            "",
            f"## {title}",
            "",
            *([text, ""] if text else []),
            "| column | unit | better | is |",
        ]
        parts += ["|---|---|---|---|"]
        parts += [f"| `{m.name}` | {m.unit} | {m.better or ''} | {m.meaning} |" for m in metrics]
    return "\n".join(parts) + "\n"


_HEAD = """\
# Metrics

<!-- python -m entrograd.cli.metrics_page writes this page from src/entrograd/storage/metrics.py -->

`results/train_offline.csv` and `results/train_online.csv` have one row per update. Every figure
measures the policy as it was before the row's update. A column is there if the run has any value of
it; a cell is empty where there is none.

While training runs, the curve grows in `.entrograd/resume/STAGE-.../curve.csv` (the log's first
lines say where; `tail -F` follows it). A run that is continued cuts it to its checkpoint.

`checkpoint.keep_best` names a column: the checkpoint whose row has the highest value (`-`
before the name: the lowest) is kept. Rows without a value judge nothing."""

_TABLES = (
    ("Which update", "", PLACES),
    (
        "Of a round",
        "In the row of the round's first update. Offline, where no round is drawn, `reward_mean` "
        "and `semantic_entropy` are of each update's batch.",
        ROUND,
    ),
    ("Of an update", "In every row, where what they are computed from is there.", UPDATE),
    (
        "Speed",
        "`results/train_offline.speed.csv` and `results/train_online.speed.csv`, one row per "
        "update: wall-clock figures differ from run to run, so these files are no outputs of the "
        "pipeline and nothing depends on them.",
        (*PLACES[:2], *SPEED),
    ),
)


if __name__ == "__main__":
    write_text(PAGE, document())
    sys.exit(0)
