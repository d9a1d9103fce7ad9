"""Section annotate of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from entrograd.models.params import local
from entrograd.params import Device, DType, Execution, Fraction, Positive, Section
from entrograd.pipeline.params import Executor
from entrograd.rewards.params import GraderParams, Head


class Alarms(Section):
    """Shares above which stage annotate, and each online round, warns, and above which it stops
    (null: never). `no_signal`: of groups whose rewards are all equal. `entropy`: the mean token
    entropy in nats, below which it warns or stops: a policy that collapsed explores no more."""

    no_answer_warn: Fraction = 0.5
    no_answer_stop: Fraction | None = None
    truncated_warn: Fraction = 0.5
    truncated_stop: Fraction | None = None
    timeout_warn: Fraction = 0.01
    timeout_stop: Fraction | None = 0.2
    no_signal_warn: Fraction = 0.99
    no_signal_stop: Fraction | None = None
    entropy_warn: Annotated[float, Field(ge=0)] = 0.02
    entropy_stop: Annotated[float, Field(ge=0)] | None = None


class AnswerClusters(Section):
    """Completions with equal final answers: of one canonical form (`exact`), or also where
    math-verify finds them equal both ways (`mathematical`)."""

    kind: Literal["answer"] = "answer"
    match: Literal["exact", "mathematical"] = "exact"


class EmbeddingClusters(Section):
    """Completions whose `text` a sentence-embedding model places close: every two of a cluster
    have a cosine of at least `threshold`. `model` is a reference as in base_model."""

    kind: Literal["embedding"]
    model: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.85
    text: Literal["completion", "answer"] = "completion"

    def files(self) -> list[str]:
        return local(self.model)


class EntailmentClusters(Section):
    """Completions whose `text`, behind the problem, each entails the other's by a model of natural
    language inference (sequence classification). `model` is a reference as in base_model."""

    kind: Literal["entailment"]
    model: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    text: Literal["completion", "answer"] = "completion"

    def files(self) -> list[str]:
        return local(self.model)


ClusterParams = AnswerClusters | EmbeddingClusters | EntailmentClusters


class ChangeSegments(Section):
    """A segment starts where the token entropy jumps by more than `delta` nats or crosses
    `baseline`, and has at least `min_length` tokens (methods.asr, source entropy)."""

    kind: Literal["change"]
    delta: Annotated[float, Field(ge=0)] = 0.1
    baseline: float = 0.0
    min_length: Positive = 3


class CutoffSegments(Section):
    """A segment closes after each token whose entropy is above `cutoff` nats."""

    kind: Literal["entropy_cutoff"]
    cutoff: Annotated[float, Field(ge=0)] = 1.75


SegmentParams = ChangeSegments | CutoffSegments


class AnnotateParams(Section):
    """Stage annotate (and each online round): reward, token entropies, clusters, segments.
    `heads`: further ratings of every completion by name, in [0, 1], for methods that compose
    rewards. `executor` is the stage's alone; each of its workers has a model and a grader."""

    grader: GraderParams = GraderParams()
    heads: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Head] = {}
    clusters: Annotated[ClusterParams, Field(discriminator="kind")] = AnswerClusters()
    segments: Annotated[SegmentParams, Field(discriminator="kind")] | None = None
    executor: Annotated[Executor, Execution] = Executor()
    token_budget: Annotated[Positive, Execution] = 32768
    alarms: Alarms = Alarms()
    dtype: DType = "auto"
    device: Annotated[Device, Execution] = "auto"


class AnnotateStage(Section):
    """What stage annotate reads."""

    annotate: AnnotateParams
