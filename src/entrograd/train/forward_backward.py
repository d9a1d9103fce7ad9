"""The passes of one optimiser update: logprobs and gradients, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from entrograd.errors import NonFiniteError
from entrograd.methods.batch import Batch
from entrograd.models.forward import completion_logprobs
from entrograd.train.batch import Examples, micro_batches
from entrograd.train.policy import Policy
from entrograd.train.scoring import CachedForward


@dataclass(frozen=True)
class StepSettings:
    """What an update needs beside model, method and data."""

    temperature: float  # of the policy that is trained, as it sampled
    max_length: int  # the longest completion sampling allows
    token_budget: int  # tokens of one micro-batch
    share_prompts: bool | None = None  # compute each prompt once; None: where that saves tokens


class ForwardBackward:
    """Forward and backward passes of `policy` over the rows of `examples`, this process's part.

    Rows of `cached` are differentiated as they were scored. A process that has no rows where
    others have some passes along, since it holds a part of their weights.
    """

    def __init__(
        self,
        policy: Policy,
        examples: Examples,
        settings: StepSettings,
        cached: CachedForward | None,
    ) -> None:
        self.policy, self.examples, self.settings = policy, examples, settings
        self.cached = cached
        self._logprobs = examples.batch.old_logprobs.clone()
        self._loss = 0.0
        self._computed: list[int] = []

    def micro_batches(self, advantages: Tensor, penalised: bool) -> Iterator[Tensor]:
        """The rows of each micro-batch; `backward` follows on each."""
        for rows in micro_batches(
            self.examples,
            advantages,
            self.settings.token_budget,
            self.cached.rows if self.cached else None,
            self.policy.processes,
            penalised,
        ):
            if len(rows):
                yield rows
            else:
                model, temperature = self.policy.model, self.settings.temperature
                completion_logprobs(model, [[0]], [[0]], temperature)[0].mul(0).backward()

    def logprobs(self, rows: Tensor) -> Tensor:
        """[b, T] nats, of the current policy, differentiable; NonFiniteError names the prompts."""
        batch = self.examples.batch
        if self.cached and rows is self.cached.rows:
            flat = self.cached.logprobs
        else:
            flat, _ = completion_logprobs(
                self.policy.model,
                [self.examples.prompt_ids[i] for i in rows],
                [self.examples.completion_ids[i] for i in rows],
                self.settings.temperature,
                self.settings.share_prompts,
            )
        old, mask = batch.old_logprobs[rows], batch.completion_mask[rows]
        current = old.to(flat.dtype).masked_scatter(mask, flat)
        if not torch.isfinite(flat).all():
            bad = (~torch.isfinite(current)).any(-1).nonzero()[:, 0]
            raise NonFiniteError(f"logprobs that are no numbers on {_prompts(batch, rows[bad])}")
        self._logprobs[rows] = current.detach().to(self._logprobs.dtype)
        self._computed += rows.tolist()
        return current

    def backward(self, loss: Tensor, rows: Tensor) -> None:
        """Add the gradient of the micro-batch's loss; NonFiniteError names the prompts."""
        if not torch.isfinite(loss):
            prompts = _prompts(self.examples.batch, rows)
            raise NonFiniteError(f"loss {float(loss.detach())} on {prompts}")
        loss.backward()
        self.policy.optimizer.collect()
        self._loss += float(loss.detach())

    def reduce(self) -> tuple[float, Tensor, float]:
        """(loss, logprobs [B, T], gradient norm) of the whole batch, gradients added up over the
        processes; rows of no micro-batch have their old logprobs. NonFiniteError names the
        prompts."""
        processes, optimizer = self.policy.processes, self.policy.optimizer
        processes.add_gradients(list(optimizer.masters.values()))
        processes.fill(self._logprobs, self._computed)
        loss = processes.total(self._loss, self._logprobs.device)
        norm = optimizer.gradient_norm()
        if not norm < float("inf"):
            batch = self.examples.batch
            prompts = _prompts(batch, torch.arange(len(batch.names)))
            raise NonFiniteError(f"gradient norm {norm} on {prompts}")
        return loss, self._logprobs, norm


def _prompts(batch: Batch, rows: Tensor) -> str:
    return f"prompts {', '.join(dict.fromkeys(batch.names[row] for row in rows.tolist()))}"
