"""What offline and online training share: the model with its optimiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from entrograd.data.groups import PromptGroup, table_of
from entrograd.errors import InputError, NonFiniteError
from entrograd.models.load import load_model, resolve_device, resolve_dtype, write
from entrograd.storage.files import atomic_folder
from entrograd.storage.tables import write_table
from entrograd.train.lora import add_adapters, merge, plain_model
from entrograd.train.optimizer import Optimizer
from entrograd.train.params import Lora, TrainParams
from entrograd.train.processes import ALONE, Processes
from entrograd.train.sharding import collected, shard, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Source:
    """Where a policy's weights were read, and what for."""

    path: Path
    dtype: str
    device: str
    lora: Lora | None = None


class Policy:
    """A model under training, its optimiser, and how both are saved.

    `model` is what is trained. With adapters (`source.lora`) they are its only parameters with
    gradients; `sampler` has what `model` computes in plain weights. One without a `source` is
    neither sampled from nor saved.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: Optimizer,
        processes: Processes = ALONE,
        source: Source | None = None,
    ) -> None:
        self.model, self.optimizer, self.processes = model, optimizer, processes
        self._source = source
        self._plain: PreTrainedModel | None = None

    @classmethod
    def load(
        cls,
        path: Path,
        params: TrainParams,
        updates: int,
        processes: Processes = ALONE,
    ) -> Policy:
        """The model in folder `path` as `params` say it is trained, for so many updates; adapters
        are drawn with `params.seed`."""
        if params.lora and processes.sharded:
            raise InputError(
                "params.yaml: lora: adapters are not divided among processes: start without "
                "--use_fsdp; each process then holds the frozen weights and the adapters"
            )
        # Read in float32: the masters keep what a bfloat16 model would round away.
        model = load_model(path, "float32", "cpu" if processes.sharded else params.device)
        if params.lora:
            add_adapters(model, params.lora, params.seed)
        masters: dict[str, torch.Tensor] = {}
        device = resolve_device(params.device)
        compute = resolve_dtype(params.dtype, device)
        if processes.sharded:
            shard(model, compute, device, processes.reshard)
        elif compute != torch.float32:
            masters = {
                n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
            }
            for weight in model.parameters():  # not the buffers: rotary angles stay exact
                weight.data = weight.data.to(compute)
        if params.optimizer.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        optimizer = Optimizer(model, masters, params.optimizer, updates)
        return cls(
            model, optimizer, processes, Source(path, params.dtype, params.device, params.lora)
        )

    @property
    def source(self) -> Source:
        """Where its weights come from."""
        assert self._source, "a policy made in memory"
        return self._source

    def sampler(self) -> PreTrainedModel:
        """The model to sample from: the one in training, or where that has adapters or a part of
        its weights alone, a plain whole one with its weights of now, always the same object.
        Every process calls this."""
        if self.source.lora:
            self._plain = self._plain or plain_model(self.model)
            merge(self._plain, self.model, self.optimizer.masters, self.model)
        elif self.processes.sharded:
            if self._plain is None:
                source = self.source
                plain = load_model(source.path, source.dtype, source.device)
                self._plain = plain.requires_grad_(False)
            for name, weight in self._plain.named_parameters():
                weight.copy_(whole(self.optimizer.masters[name]))
        return self._plain or self.model

    def save(
        self,
        tokenizer: PreTrainedTokenizerBase,
        path: Path,
        best: Mapping[str, torch.Tensor] | None,
    ) -> None:
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

    def _write(
        self, weights: Mapping[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
    ) -> None:
        if self.source.lora or self.processes.sharded:
            model = load_model(self.source.path, "float32", "cpu")
        else:
            model = self.model.float()
        if self.source.lora:
            merge(model, self.model, weights, model)
        else:
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.copy_(weights[name])
        write(model, tokenizer, folder)


@contextmanager
def bad_batch_kept(groups: Sequence[PromptGroup], folder: Path) -> Iterator[None]:
    """If an update meets a value that is no finite number: store its `groups` in `folder` and name
    the file in the error."""
    try:
        yield
    except NonFiniteError as error:
        path = folder / "nonfinite.parquet"
        write_table(path, table_of(groups, "annotated"), "annotated", error=str(error))
        raise NonFiniteError(
            f"{error}. The update was not made; its batch is in {path}. Lower optimizer.lr, "
            "compute in float32 (dtype), or leave those prompts out"
        ) from None
