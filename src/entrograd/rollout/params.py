"""Section rollout of params.yaml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from entrograd.params import Device, DType, Execution, Positive, Section
from entrograd.pipeline.params import Executor


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


class VllmParams(Section):
    """Engines vllm (its processes are children of this one) and vllm_server (over HTTP, at `url`;
    where that is null, a server on loopback is started and ended with the run). docs/vllm.md.

    `kv_cache_gib`: memory of the key-value cache; null: what `gpu_memory_utilization` leaves on a
    GPU, 2 on a CPU. `enforce_eager`, `sleep` (weights leave the GPU between rounds): null decides
    by the hardware. `weights`: how new weights reach the engine: `folder` (written to
    `weights_folder`, which a server must see too; null: the run's resume folder), `ipc` (shared GPU
    memory, in process, one GPU), `nccl`; auto: ipc where it works, else folder. `max_mismatch`:
    after each update the mean difference, in nats, between the engine's and the trainer's
    log-probabilities of a fixed text may not exceed it; null: 0.001 in float32, 0.15 in bfloat16.
    `retries`: attempts in a row, without any progress, before a lost engine is an error.
    """

    url: Annotated[Annotated[str, Field(pattern=r"^https?://[^/]+$")] | None, Execution] = None
    tensor_parallel_size: Positive = 1
    data_parallel_size: Positive = 1
    gpu_memory_utilization: Annotated[Annotated[float, Field(gt=0, le=1)], Execution] = 0.5
    kv_cache_gib: Annotated[Annotated[float, Field(gt=0)] | None, Execution] = None
    max_model_len: Positive | None = None
    max_num_seqs: Positive = 256
    enforce_eager: bool | None = None
    sleep: Annotated[bool | None, Execution] = None
    weights: Annotated[Literal["auto", "folder", "ipc", "nccl"], Execution] = "auto"
    weights_folder: Annotated[str | None, Execution] = None
    max_mismatch: Annotated[float, Field(gt=0)] | None = None
    concurrency: Annotated[Positive, Execution] = 128
    timeout_seconds: Annotated[Annotated[float, Field(gt=0)], Execution] = 600.0
    start_seconds: Annotated[Annotated[float, Field(gt=0)], Execution] = 900.0
    retries: Annotated[Positive, Execution] = 5


class RolloutParams(Section):
    """Stage rollout. `prompts`: how many training prompts (all where null), in table order."""

    engine: Literal["transformers", "vllm", "vllm_server"] = "transformers"
    vllm: VllmParams = VllmParams()
    prompts: Positive | None = None
    group_size: Annotated[int, Field(ge=1)] = 8
    sampling: Sampling = Sampling()
    seed: int = 0
    shard_prompts: Annotated[Positive, Execution] = 32
    executor: Annotated[Executor, Execution] = Executor()
    token_budget: Annotated[Positive, Execution] = 32768
    dtype: DType = "auto"
    device: Annotated[Device, Execution] = "auto"

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


class RolloutStage(Section):
    """What stage rollout reads."""

    rollout: RolloutParams
