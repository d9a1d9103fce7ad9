"""What offline and online training share: the model with its optimiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from entrograd.errors import InputError, NonFiniteError
from entrograd.models.load import load_model, resolve_device, resolve_dtype, write
from entrograd.storage.files import atomic_folder
from entrograd.storage.tables import write_table
from entrograd.train.lora import add_adapters, merge, plain_model
from entrograd.train.optimizer import Optimizer
from entrograd.train.params import Lora
from entrograd.train.params import Optimizer as OptimizerParams
from entrograd.train.processes import ALONE, Processes
from entrograd.train.sharding import collected, shard, whole


class Policy:
    """A model under training, its optimiser, and how both are saved.

    `model` is what is trained. With adapters (`lora`, drawn with `seed`) they are its only
    parameters with gradients; `sampler` has what `model` computes in plain weights.
    """

    def __init__(
        self,
        path: Path,
        dtype: str,
        device: str,
        params: OptimizerParams,
        updates: int,
        lora: Lora | None = None,
        seed: int = 0,
        processes: Processes = ALONE,
    ) -> None:
        self.path, self.dtype, self.device = path, dtype, device
        self.lora, self.processes = lora, processes
        if lora and processes.sharded:
            raise InputError(
                "params.yaml: lora: adapters are not divided among processes: start without "
                "--use_fsdp; each process then holds the frozen weights and the adapters"
            )
        # Read in float32: the masters keep what a bfloat16 model would round away.
        self.model = load_model(path, "float32", "cpu" if processes.sharded else device)
        if lora:
            add_adapters(self.model, lora, seed)
        masters: dict[str, torch.Tensor] = {}
        compute = resolve_dtype(dtype, resolve_device(device))
        if processes.sharded:
            shard(self.model, compute, resolve_device(device), processes.reshard)
        elif compute != torch.float32:
            masters = {
                n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad
            }
            for weight in self.model.parameters():  # not the buffers: rotary angles stay exact
                weight.data = weight.data.to(compute)
        if params.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.optimizer = Optimizer(self.model, masters, params, updates)
        self._plain: Any = None

    def sampler(self) -> Any:
        """The model to sample from: the one in training, or where that has adapters or a part of
        its weights alone, a plain whole one with its weights of now, always the same object.
        Every process calls this."""
        if self.lora:
            self._plain = self._plain or plain_model(self.model)
            merge(self._plain, self.model, self.optimizer.masters, self.model)
        elif self.processes.sharded:
            if self._plain is None:
                plain = load_model(self.path, self.dtype, self.device)
                self._plain = plain.requires_grad_(False)
            for name, weight in self._plain.named_parameters():
                weight.copy_(whole(self.optimizer.masters[name]))
        return self._plain or self.model

    def save(self, tokenizer: Any, path: Path, best: Mapping[str, torch.Tensor] | None) -> None:
        """Write the float32 master weights, and those of `best` (float32, by name) to the folder
        `best` in it; the policy is of no further use. Adapters are added to the float32 weights
        that training began with. Every process calls this, one writes."""
        weights = collected(self.optimizer.masters, self.processes.main)
        if not self.processes.main:
            return
        with atomic_folder(path) as folder:
            self._write(weights, tokenizer, folder)
            if best is not None:  # second: a float32 model's weights are the masters themselves
                self._write(best, tokenizer, folder / "best")

    def _write(self, weights: Mapping[str, torch.Tensor], tokenizer: Any, folder: Path) -> None:
        if self.lora or self.processes.sharded:
            model = load_model(self.path, "float32", "cpu")
        else:
            model = self.model.to(torch.float32)
        if self.lora:
            merge(model, self.model, weights, model)
        else:
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.copy_(weights[name])
        write(model, tokenizer, folder)


@contextmanager
def bad_batch_kept(rows: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[None]:
    """Where a step meets a value that is no finite number: store its `rows` in `folder` and name
    the file in the error."""
    try:
        yield
    except NonFiniteError as error:
        path = folder / "nonfinite.parquet"
        write_table(path, [dict(row) for row in rows], "annotated", error=str(error))
        raise NonFiniteError(
            f"{error}. The update was not made; its batch is in {path}. Lower optimizer.lr, "
            "compute in float32 (dtype), or leave those prompts out"
        ) from None
