"""What offline and online training share: the model with its optimiser, and the columns check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from entrograd.errors import InputError
from entrograd.methods.base import Recipe
from entrograd.models.load import load_model, resolve_device, resolve_dtype, save
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
        self.optimizer = Optimizer(self.model, masters, params, steps)

    def save(self, tokenizer: Any, path: Path) -> None:
        """Write the float32 master weights; the policy is of no further use."""
        self.model.to(torch.float32)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if name in self.optimizer.masters:
                    weight.copy_(self.optimizer.masters[name])
        save(self.model, tokenizer, path)


def check_columns(recipe: Recipe, rows: Iterable[Mapping[str, Any]], where: str) -> None:
    """InputError, before anything runs, where a column the method needs is empty in some row."""
    for number, row in enumerate(rows):
        for column in sorted(recipe.needs):
            if row.get(column) in (None, []):
                raise InputError(
                    f"{where}: row {number}: {column} is empty and method {recipe.name} needs it; "
                    "annotate the rollouts with it or choose another method"
                )
