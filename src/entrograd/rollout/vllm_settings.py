"""How vLLM is started, from section rollout: arguments, environment, and how weights travel."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from entrograd.errors import InputError
from entrograd.models.load import resolve_device, resolve_dtype
from entrograd.rollout.params import RolloutParams
from entrograd.rollout.vllm_worker import PARENT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORKER = "entrograd.rollout.vllm_worker.WorkerExtension"


class SyncClient(Protocol):
    """The calls of a weight transfer that a trainer makes: vLLM's VLLMWeightSyncClient."""

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> None:
        """Connect the workers to the trainer."""

    def start_weight_update(self) -> None:
        """Get ready for weights."""

    def update_weights(self, update_info: object) -> None:
        """Receive weights."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Put them in place."""


class Sender(Protocol):
    """The trainer's side of a weight transfer."""

    def send_weights(self) -> object:
        """Send all weights."""


def engine_dtype(params: RolloutParams) -> torch.dtype:
    """What vLLM computes in."""
    return resolve_dtype(params.dtype, resolve_device("auto"))


def on_cpu() -> bool:
    """Whether vLLM runs on the CPU here."""
    return resolve_device("auto").type == "cpu"


def transfer(params: RolloutParams) -> str:
    """How weights travel: folder, ipc or nccl."""
    chosen = params.vllm.weights
    if chosen != "auto":
        return chosen
    alone = params.engine == "vllm" and params.vllm.tensor_parallel_size == 1
    return "ipc" if alone and not on_cpu() else "folder"


def engine_arguments(params: RolloutParams, context: int) -> dict[str, object]:
    """vLLM's EngineArgs, by name: arguments of LLM and, with dashes, of its server."""
    chosen, cpu = params.vllm, on_cpu()
    longest = chosen.max_model_len or context
    arguments: dict[str, object] = {
        "dtype": str(engine_dtype(params)).removeprefix("torch."),
        "seed": 0,  # each request brings its own
        "tensor_parallel_size": chosen.tensor_parallel_size,
        "max_model_len": longest,
        "max_num_seqs": chosen.max_num_seqs,
        "enforce_eager": cpu if chosen.enforce_eager is None else chosen.enforce_eager,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # of the distribution really sampled from
        "gpu_memory_utilization": chosen.gpu_memory_utilization,
        "worker_extension_cls": WORKER,
        "use_tqdm_on_load": False,
    }
    if chosen.kv_cache_gib or cpu:
        arguments["kv_cache_memory_bytes"] = int((chosen.kv_cache_gib or 2.0) * 2**30)
    if cpu:
        # A prompt computed in parts resets its request's generator, which the CPU's cannot.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(8192, longest)
    if (backend := transfer(params)) != "folder":
        arguments["weight_transfer_config"] = {"backend": backend}
    return arguments


def flags_of(arguments: Mapping[str, object]) -> list[str]:
    """EngineArgs as the server's command line has them."""
    words: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, dict):
            words += [f"--{flag}.{key}={item}" for key, item in value.items()]
        else:
            words += [f"--{flag}", str(value)]
    return words


def environment(params: RolloutParams) -> dict[str, str]:
    """Environment of vLLM's processes: no usage statistics, no hub, all cores of a CPU, and whom
    they belong to."""
    wanted = {
        PARENT: str(os.getpid()),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    chosen = params.vllm
    if on_cpu() and chosen.tensor_parallel_size * chosen.data_parallel_size == 1:
        cores = sorted(os.sched_getaffinity(0))
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in cores)
    if on_cpu() and chosen.enforce_eager is not False:
        wanted["TORCHDYNAMO_DISABLE"] = "1"  # else the sampler is compiled at the first call
    if transfer(params) == "ipc":
        wanted["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles of GPU memory are pickles
    forced = {PARENT, "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"}
    return {k: v if k in forced else os.environ.get(k, v) for k, v in wanted.items()}


def require_vllm(engine: str) -> None:
    """InputError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            f"rollout.engine {engine}: vLLM is not installed; `make setup VLLM=cuda` (on a CPU: "
            "VLLM=cpu), or pip install 'entrograd[vllm]', or take engine transformers"
        )


def device_sender(
    backend: str, params: RolloutParams, client: SyncClient, model: PreTrainedModel
) -> Sender:
    """vLLM's sender of weights between GPUs."""
    from vllm.distributed.weight_transfer.base import ModuleSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        start: Any = IPCTrainerInitInfo(rank=0, packed=True)
    else:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        workers = params.vllm.tensor_parallel_size * params.vllm.data_parallel_size
        start = NCCLTrainerInitInfo(
            rank=0, master_address=get_ip(), master_port=get_open_port(), world_size=workers + 1
        )
    sender: Sender = WeightTransferTrainerFactory.trainer_init(
        start, client=client, source=ModuleSource(model)
    )
    return sender
