"""The types that components write their parameters with."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
UnitFraction = Annotated[float, Field(gt=0, le=1)]
ClipLow = Annotated[float, Field(ge=0, le=1)]
Tokens = Annotated[int, Field(gt=0)]
