"""Sections evaluate and score of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from entrograd.data.params import FileSource, HubSource, PromptFormat
from entrograd.params import Device, DType, Execution, Positive, Section
from entrograd.rewards.params import GraderParams
from entrograd.rollout.params import Sampling

HELDOUT = "heldout"  # the name of the held-out split among benchmarks


class Benchmark(Section):
    """pass@1 on one list of problems: greedy where `temperature` is 0, else the mean of `n`
    samples. `sha256` pins the list's content hash; a different list is an error."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    source: Annotated[FileSource | HubSource, Field(discriminator="kind")]
    prompt: PromptFormat = PromptFormat()
    n: Positive = 1
    sampling: Sampling = Sampling(temperature=0.0)
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _greedy_once(self) -> Benchmark:
        if self.sampling.temperature == 0 and self.n != 1:
            raise ValueError("n must be 1 where sampling.temperature is 0: greedy has one answer")
        return self


class EvaluateParams(Section):
    """Stage evaluate: greedy completions of the held-out split, then the benchmarks."""

    heldout_problems: Positive | None = None
    max_new_tokens: Positive = 256
    stop: list[str] = []
    benchmarks: list[Benchmark] = []
    seed: int = 0
    grader: GraderParams = GraderParams()
    token_budget: Annotated[Positive, Execution] = 32768
    dtype: DType = "auto"
    device: Annotated[Device, Execution] = "auto"

    @model_validator(mode="after")
    def _distinct(self) -> EvaluateParams:
        names = [benchmark.name for benchmark in self.benchmarks]
        if len(set(names)) != len(names):
            raise ValueError("benchmarks: each name may appear once")
        return self


class EvaluateStage(Section):
    """What stage evaluate reads."""

    evaluate: EvaluateParams


class ScoreParams(Section):
    """Stage score: intervals that hold at `confidence`. `bootstrap`: how often the problems are
    resampled, by a generator seeded with `seed`, where an interval is no Wilson interval."""

    bootstrap: Positive = 10_000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: int = 0


class ScoreStage(Section):
    """What stage score reads."""

    score: ScoreParams
