"""Load and save models in the Hugging Face layout: safetensors, no foreign code, no network."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from entrograd.environment import note_resolved
from entrograd.errors import InputError
from entrograd.storage.files import atomic_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("entrograd")


def resolve_device(device: str) -> torch.device:
    """`auto` is the first GPU where there is one; InputError where a named GPU is absent."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device}: this machine shows no GPU; use cpu or auto")
    place = torch.device(device)
    gpu = f" ({torch.cuda.get_device_name(place)})" if place.type == "cuda" else ""
    note_resolved("device", f"{device}{gpu}")
    note_resolved("threads", torch.get_num_threads())
    return place


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it fast, else float32.

    A GPU of compute capability 8, or a CPU with AMX or AVX512-BF16 does; a CPU without runs
    bfloat16 products several times slower than float32. A property of the machine, not a timing:
    the choice is the same in every run.
    """
    if dtype != "auto":
        return torch.float32 if dtype == "float32" else torch.bfloat16
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    note_resolved("dtype", "bfloat16" if fast else "float32")
    return torch.bfloat16 if fast else torch.float32


def load_model(path: Path | str, dtype: str, device: str) -> Any:
    """The causal language model in folder `path`, in evaluation mode."""
    _check_folder(path)
    place = resolve_device(device)
    if place.type == "cpu":
        _keep_freed_memory()
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=resolve_dtype(dtype, place), local_files_only=True, use_safetensors=True
    )
    return model.to(place).eval()


def load_tokenizer(path: Path | str) -> Any:
    """The tokenizer in folder `path`."""
    _check_folder(path)
    return AutoTokenizer.from_pretrained(str(path), local_files_only=True)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path | str) -> None:
    """Write weights (safetensors) and tokenizer to folder `path`, whole or not at all."""
    with atomic_folder(path) as folder:
        write(model, tokenizer, folder)


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The files of `save`, into a folder that the caller makes appear at once."""
    with system_errors():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o644)


@contextmanager
def system_errors() -> Iterator[None]:
    """Where safetensors cannot write, raise the system's own error, as other files do."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def policy_version(model: PreTrainedModel) -> str:
    """The first 16 hex digits of the sha256 of all weights' sha256, by name, in the dtype they are
    in. Hashing leaves Python's lock, so weights are hashed side by side."""
    weights = sorted(model.state_dict().items())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = pool.map(_hash, (weight for _, weight in weights))
        named = (
            f"{name} {w.dtype} {tuple(w.shape)} {part}\n"
            for (name, w), part in zip(weights, parts, strict=True)
        )
        return hashlib.sha256("".join(named).encode()).hexdigest()[:16]


def _hash(weight: torch.Tensor) -> str:
    data = weight.detach().cpu().contiguous().view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()


def context_length(model: PreTrainedModel) -> int:
    """How many tokens prompt and completion may have together."""
    return int(model.config.max_position_embeddings)


def folder_context(path: Path | str) -> int:
    """`context_length` of the model in folder `path`, without its weights."""
    _check_folder(path)
    config = AutoConfig.from_pretrained(str(path), local_files_only=True)
    return int(config.max_position_embeddings)


def _keep_freed_memory() -> None:
    """Keep what is freed for what is allocated next, where the C library is glibc.

    A training step frees and allocates the same gigabytes again and again. By default glibc gives
    large blocks back to the system at once, and pages fresh from it cost more time than most of
    what is computed in them: on a virtual machine an eighth of a step of SmolLM2-135M.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink
        mallopt(-4, 0)  # M_MMAP_MAX: no block is the system's own


def _check_folder(path: Path | str) -> None:
    if not (Path(path) / "config.json").is_file():
        raise InputError(f"{path}: no config.json: not a model folder; stage base_model writes one")
