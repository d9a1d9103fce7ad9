"""Training and held-out rows, told apart by content alone."""

from __future__ import annotations

from entrograd.data.normalise import content_number


def split(problem: str, heldout_fraction: float) -> str:
    """`heldout` if the problem's content number is below `heldout_fraction`, else `train`.

    Rows added, removed or reordered never move another row; equal problems stay together.
    """
    return "heldout" if content_number(problem) < heldout_fraction else "train"
