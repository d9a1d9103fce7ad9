"""AdamW on float32 master weights, with the schedule and the gradient norm's bound."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from entrograd.train.sharding import part_of

if TYPE_CHECKING:
    from torch.nn import Module

    from entrograd.train.params import Optimizer as OptimizerParams


class Optimizer:
    """Updates a model's weights, those named in `masters` (bfloat16 ones) through float32 masters.

    The masters hold what training has learnt: an update smaller than bfloat16's resolution is
    kept there, gradients of micro-batches are added up in float32, and `masters` is what is saved.
    """

    def __init__(
        self,
        model: Module,
        masters: dict[str, Tensor],
        params: OptimizerParams,
        updates: int,
    ) -> None:
        self.params, self.updates = params, updates
        self.weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.masters = {
            name: masters[name].requires_grad_() if name in masters else weight
            for name, weight in self.weights.items()
        }
        self.adamw = torch.optim.AdamW(
            self.masters.values(),
            lr=params.lr,
            betas=params.betas,
            eps=params.eps,
            weight_decay=params.weight_decay,
            fused=True,
        )
        self.done = 0

    def learning_rate(self) -> float:
        """The rate of the next update: linear warm-up to `lr`, then the schedule to the last."""
        p, step = self.params, self.done
        if step < p.warmup_updates:
            return p.lr * (step + 1) / p.warmup_updates
        if p.schedule == "constant":
            return p.lr
        part = (step - p.warmup_updates) / max(1, self.updates - p.warmup_updates)
        if p.schedule == "linear":
            return p.lr * (1 - part)
        return p.lr * 0.5 * (1 + math.cos(math.pi * part))

    def collect(self) -> None:
        """Add the weights' gradients, one micro-batch's, to the masters' in float32."""
        for name, weight in self.weights.items():
            master = self.masters[name]
            if master is weight or weight.grad is None:
                continue
            gradient = weight.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            weight.grad = None

    def gradient_norm(self) -> float:
        """The global norm of the collected gradients (0 where there are none), not yet bounded."""
        gradients = [m.grad for m in self.masters.values() if m.grad is not None]
        if not gradients:
            return 0.0
        norm = torch.nn.utils.get_total_norm(gradients)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def step(self, norm: float) -> None:
        """One update with gradients scaled to `max_grad_norm` where their `norm` exceeds it."""
        scale = self.params.max_grad_norm / (norm + 1e-6)
        if scale < 1:
            torch._foreach_mul_(
                [m.grad for m in self.masters.values() if m.grad is not None], scale
            )
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate()
        if norm > 0:
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.done += 1
        with torch.no_grad():
            for name, weight in self.weights.items():
                if self.masters[name] is not weight:
                    weight.copy_(self.masters[name])

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, int]]:
        """What an update depends on: float32 masters and AdamW's moments by name, and the rest as
        JSON. Masters without a gradient so far have no moments; what is divided among processes
        stays divided."""
        tensors: dict[str, dict[str, Tensor]] = {"weights": dict(self.masters)}
        for name, master in self.masters.items():
            for kind, value in self.adamw.state.get(master, {}).items():
                tensors.setdefault(kind, {})[name] = value
        return tensors, {"done": self.done}

    def load_state(self, tensors: dict[str, dict[str, Tensor]], scalars: dict[str, int]) -> None:
        """Put `state()` back, into the weights too."""
        self.done = scalars["done"]
        self.adamw.state.clear()
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(part_of(tensors["weights"][name], master))
                self.weights[name].copy_(master)
        for kind, values in tensors.items():
            if kind == "weights":
                continue
            for name, value in values.items():
                master = self.masters[name]
                self.adamw.state[master][kind] = value if kind == "step" else part_of(value, master)
