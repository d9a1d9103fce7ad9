"""Which engine `rollout.engine` names, made ready."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from entrograd.errors import InputError
from entrograd.rollout.engine import Engine
from entrograd.rollout.params import RolloutParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_engine(
    params: RolloutParams,
    folder: Path,
    policy: PreTrainedModel | None = None,
    work: Path | None = None,
    rank: int = 0,
) -> Engine:
    """The engine `params.engine` on the model in `folder`; close it when done.

    Args:
        params: section rollout.
        folder: a model folder with its tokenizer.
        policy: the trainer's model, holding the weights of `folder`; an engine in its process and
            on its device may sample from it instead of loading them again.
        work: a folder of the run's own: what a killed run leaves there, the next one removes.
        rank: of this process among those that train (`check_processes`); the first one updates a
            server's weights.

    Raises:
        InputError: an engine that is not installed, or settings it cannot take.
    """
    if params.engine == "vllm":
        from entrograd.rollout.vllm_engine import InProcessVllm

        return InProcessVllm(params, folder, policy, work)
    if params.engine == "vllm_server":
        from entrograd.rollout.vllm_server import VllmServer

        return VllmServer(params, folder, policy, work, follows=rank > 0)
    from entrograd.models.load import load_model, load_tokenizer
    from entrograd.rollout.transformers_engine import TransformersEngine

    model = load_model(folder, params.dtype, params.device) if policy is None else policy
    return TransformersEngine(model, load_tokenizer(folder), params.token_budget)


def known_context(params: RolloutParams, folder: Path) -> int:
    """How many tokens prompt and completion may have together, as far as it is known before the
    engine is open: a server at `vllm.url` may have been started for fewer."""
    from entrograd.models.load import folder_context

    chosen = params.vllm.max_model_len if params.engine != "transformers" else None
    return chosen or folder_context(folder)


def check_processes(params: RolloutParams, count: int) -> None:
    """InputError where `count` training processes cannot share the engine."""
    if count > 1 and params.engine != "transformers" and params.vllm.url is None:
        raise InputError(
            f"rollout.engine {params.engine}: each of the {count} processes would start a vLLM of "
            "its own, on the same GPUs; start one server for all (docs/vllm.md) and give "
            "rollout.engine: vllm_server with its address in execution.rollout.vllm.url"
        )
