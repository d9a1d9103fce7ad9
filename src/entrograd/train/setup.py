"""What offline and online training share: the model with its optimiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from entrograd import io
from entrograd.errors import NonFiniteError
from entrograd.models.load import load_model, resolve_device, resolve_dtype, write
from entrograd.params import Optimizer as OptimizerParams
from entrograd.train.optimizer import Optimizer


class Policy:
    """A model under training, its optimiser, and how both are saved."""

    def __init__(
        self, path: Path, dtype: str, device: str, params: OptimizerParams, steps: int
    ) -> None:
        # Read in float32: the masters keep what a bfloat16 model would round away.
        self.model = load_model(path, "float32", device)
        masters: dict[str, torch.Tensor] = {}
        compute = resolve_dtype(dtype, resolve_device(device))
        if compute != torch.float32:
            masters = {n: p.detach().clone() for n, p in self.model.named_parameters()}
            self.model.to(compute)
        if params.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.optimizer = Optimizer(self.model, masters, params, steps)

    def save(self, tokenizer: Any, path: Path, best: Mapping[str, torch.Tensor] | None) -> None:
        """Write the float32 master weights, and those of `best` (float32, by name) to the folder
        `best` in it; the policy is of no further use."""
        self.model.to(torch.float32)
        with io.atomic_folder(path) as folder:
            self._write(self.optimizer.masters, tokenizer, folder)
            if best is not None:  # second: a float32 model's weights are the masters themselves
                self._write(best, tokenizer, folder / "best")

    def _write(self, weights: Mapping[str, torch.Tensor], tokenizer: Any, folder: Path) -> None:
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if name in weights:
                    weight.copy_(weights[name])
        write(self.model, tokenizer, folder)


@contextmanager
def bad_batch_kept(rows: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[None]:
    """Where a step meets a value that is no finite number: store its `rows` in `folder` and name
    the file in the error."""
    try:
        yield
    except NonFiniteError as error:
        path = folder / "nonfinite.parquet"
        io.write_table(path, [dict(row) for row in rows], "annotated", error=str(error))
        raise NonFiniteError(
            f"{error}. The update was not made; its batch is in {path}. Lower optimizer.lr, "
            "compute in float32 (dtype), or leave those prompts out"
        ) from None
