"""Which engine `rollout.engine` names, made ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entrograd.params import RolloutParams
from entrograd.rollout.engine import Engine


def open_engine(params: RolloutParams, folder: Path, policy: Any | None = None) -> Engine:
    """The engine `params.engine` on the model in `folder`; close it when done.

    Args:
        params: section rollout.
        folder: a model folder with its tokenizer.
        policy: the trainer's model, holding the weights of `folder`; an engine in its process and
            on its device may sample from it instead of loading them again.

    Raises:
        InputError: an engine that is not installed, or settings it cannot take.
    """
    if params.engine == "vllm":
        from entrograd.rollout.vllm_engine import InProcessVllm

        return InProcessVllm(params, folder, policy)
    if params.engine == "vllm_server":
        from entrograd.rollout.vllm_server import VllmServer

        return VllmServer(params, folder, policy)
    from entrograd.models.load import load_model, load_tokenizer
    from entrograd.rollout.transformers_engine import TransformersEngine

    model = load_model(folder, params.dtype, params.device) if policy is None else policy
    return TransformersEngine(model, load_tokenizer(folder), params.token_budget)
