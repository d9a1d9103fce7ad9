"""Segments of completions by their token entropies, stored so that every method cuts alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from entrograd.annotate.params import ChangeSegments, SegmentParams
from entrograd.numerics.segments import change_segments, entropy_segments


def segment_ids(entropies: Sequence[Sequence[float]], params: SegmentParams) -> list[list[int]]:
    """The segment of each token of each completion, from 0, given its entropies in nats."""
    found = []
    for values in entropies:
        scores = torch.tensor([values], dtype=torch.float32)
        mask = torch.ones_like(scores, dtype=torch.bool)
        if isinstance(params, ChangeSegments):
            bounds = params.delta, params.baseline, params.min_length
            ids = change_segments(scores.double(), mask, *bounds)
        else:
            ids = entropy_segments(scores, mask, params.cutoff)
        found.append(ids[0].tolist())
    return found
