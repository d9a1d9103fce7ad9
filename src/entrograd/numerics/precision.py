"""The precision sums are kept in."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation(tensor: Tensor) -> torch.dtype:
    """float64 for float64 values, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
