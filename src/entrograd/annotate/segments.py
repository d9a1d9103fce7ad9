"""Segments of completions by their token entropies, stored so that every method cuts alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from entrograd.annotate.params import ChangeSegments, SegmentParams
from entrograd.numerics.segments import change_segments, entropy_segments


def segment_ids(entropies: Sequence[np.ndarray], params: SegmentParams) -> list[np.ndarray]:
    """[T] int32 the segment of each token of each completion, from 0, given its entropies [T] in
    nats."""
    segments = []
    for values in entropies:
        scores = torch.tensor(values, dtype=torch.float32)[None]
        mask = torch.ones_like(scores, dtype=torch.bool)
        if isinstance(params, ChangeSegments):
            bounds = params.delta, params.baseline, params.min_length
            ids = change_segments(scores.double(), mask, *bounds)
        else:
            ids = entropy_segments(scores, mask, params.cutoff)
        segments.append(ids[0].int().numpy())
    return segments
