"""How completions are rated: `grader` and `heads` in sections of params.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from entrograd.params import Execution, Positive, Section

ExtractionRule = Literal["boxed", "anchor", "leading", "last", "line"]


class GraderParams(Section):
    """`extraction`: the rules that find a final answer, in the order they are tried.
    math-verify runs in processes of its own; a row that takes longer is marked `timeout`."""

    extraction: Annotated[list[ExtractionRule], Field(min_length=1)] = [
        "boxed",
        "anchor",
        "leading",
        "last",
        "line",
    ]
    timeout_seconds: Annotated[float, Field(gt=0)] = 5.0
    workers: Annotated[Positive, Execution] = 2
    memory_mb: Positive = 2048


class Head(Section):
    """A reward head beside correctness. `function`: format, brevity, repetition, language or steps
    (the head's own name where null), or MODULE:FUNCTION, importable or beside params.yaml;
    `options` are its keyword arguments."""

    function: str | None = None
    options: dict[str, Any] = {}

    def files(self) -> list[str]:
        module, colon, _ = (self.function or "").partition(":")
        file = f"{module.replace('.', '/')}.py"
        return [file] if colon and Path(file).exists() else []
