"""Section report of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from entrograd.params import Section


class ReportParams(Section):
    """Stage report."""

    title: str = "entrograd"
    samples: Annotated[int, Field(ge=0)] = 12
