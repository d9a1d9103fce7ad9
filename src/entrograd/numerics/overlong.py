"""DAPO's soft penalty for completions near the length limit (arXiv 2503.14476, Eq. 13)."""

from __future__ import annotations

from torch import Tensor


def overlong_penalty(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """[B] 0 up to Lmax - Lc, then linear to -1 at Lmax, -1 beyond; float64.

    Args:
        lengths: [B] tokens; longest: Lmax; buffer: Lc.
    """
    return ((longest - buffer - lengths.double()) / buffer).clamp(min=-1.0, max=0.0)
