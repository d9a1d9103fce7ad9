"""One process, or many that `accelerate launch` started: who does what, and what is exchanged.

Data parallel: every process holds the whole model and every round's groups. It draws its share of a
round's prompts, computes the gradient of its share of a batch, and the gradients are added up once
an update, in the masters' float32. Loss denominators are those of the whole batch, so nothing is
averaged and the shares may be of any size.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence, Sized
from typing import TypeVar

import torch
from torch import Tensor

from entrograd.errors import InputError
from entrograd.models.load import resolve_device

log = logging.getLogger("entrograd")

T = TypeVar("T")


class Processes:
    """This process and the others; alone, rank 0 of 1, nothing is exchanged."""

    rank, count = 0, 1
    sharded = False  # FSDP2: each holds a part of the weights (train.sharding)
    reshard = True

    @property
    def main(self) -> bool:
        """Whether this one writes the files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of `items`: every `count`-th."""
        return list(items[self.rank :: self.count])

    def gather(self, shares: Sequence[T]) -> list[T]:
        """The whole of which each process gives the `share` it has worked on, in its order."""
        return list(shares)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""

    def wait(self) -> None:
        """Go on when every process is here."""

    def agree(self, value: bool) -> bool:
        """The first process's value, in all of them."""
        return self.gather([value])[0]

    def even(self, parts: list[T], nothing: T) -> list[T]:
        """`parts`, with `nothing` behind them up to the most that any process has, where all must
        make equally many passes."""
        if not self.sharded:
            return parts
        return parts + [nothing] * (max(self.gather([len(parts)])) - len(parts))

    def add_gradients(self, masters: Sequence[Tensor]) -> None:
        """Sum the masters' gradients; one that no process has stays absent."""
        if self.count == 1 or self.sharded:  # the backward pass has added up the parts
            return
        device = masters[0].device
        found = torch.tensor([float(m.grad is not None) for m in masters], device=device)
        self.add([found])
        for master, somewhere in zip(masters, found.tolist(), strict=True):
            if somewhere and master.grad is None:
                master.grad = torch.zeros_like(master)
        self.add([master.grad for master in masters if master.grad is not None])

    def fill(self, values: Tensor, computed: Sequence[int]) -> None:
        """Put into `values` [B, ...] the rows that other processes computed; no row has two."""
        if self.count == 1:
            return
        found, theirs = torch.zeros_like(values[:, 0]), torch.zeros_like(values)
        found[list(computed)], theirs[list(computed)] = 1, values[list(computed)]
        self.add([found, theirs])
        values[found > 0] = theirs[found > 0]

    def total(self, value: float, device: torch.device) -> float:
        """The sum of a number over the processes."""
        if self.count == 1:
            return value
        sum_ = torch.tensor(value, device=device)
        self.add([sum_])
        return float(sum_)

    def check_equal(self, value: str, what: str) -> None:
        """InputError where the processes differ in `value`."""
        found = self.gather([value])
        if len(set(found)) > 1:
            raise InputError(
                f"{what} differs between processes ({', '.join(sorted(set(found)))}): start them "
                "with the same files, versions and kind of device"
            )

    def close(self) -> None:
        """End the connection."""


class Launched(Processes):
    """A process of several that Accelerate connects (NCCL on GPUs, gloo on CPUs)."""

    def __init__(self, device: str) -> None:
        from accelerate import PartialState

        settings = {
            name: os.environ.get(name, "").lower()
            for name in (
                *("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_RESHARD_AFTER_FORWARD"),
                *("FSDP_OFFLOAD_PARAMS", "ACCELERATE_USE_DEEPSPEED"),
            )
        }
        if settings["ACCELERATE_USE_DEEPSPEED"] == "true":
            raise InputError(
                "accelerate launch --use_deepspeed: DeepSpeed's engine owns optimiser and backward "
                "pass, which is not supported; use --use_fsdp --fsdp_version 2"
            )
        self.sharded = settings["ACCELERATE_USE_FSDP"] == "true"
        self.reshard = settings["FSDP_RESHARD_AFTER_FORWARD"] != "false"
        if self.sharded and settings["FSDP_VERSION"] != "2":
            raise InputError("accelerate launch --use_fsdp: add --fsdp_version 2")
        if self.sharded and settings["FSDP_OFFLOAD_PARAMS"] == "true":
            raise InputError("accelerate launch --fsdp_offload_params: not supported; leave it out")
        # transformers would load weights in the first process alone
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        self._state = PartialState(cpu=resolve_device(device).type == "cpu")
        self.rank, self.count = self._state.process_index, self._state.num_processes
        assert self.count == int(os.environ["WORLD_SIZE"])
        kind = ", each with a part of the weights" if self.sharded else ""
        log.info("process %d of %d%s", self.rank + 1, self.count, kind)

    def gather(self, shares: Sequence[T]) -> list[T]:
        from accelerate.utils import gather_object

        parts: list[list[T]] = gather_object([list(shares)])
        longest = max(len(part) for part in parts)
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def add(self, tensors: Sequence[Tensor]) -> None:
        running = [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in running:
            work.wait()

    def wait(self) -> None:
        self._state.wait_for_everyone()

    def close(self) -> None:
        self._state.destroy_process_group()


ALONE = Processes()


def connect(device: str) -> Processes:
    """The processes of this run. Call before a model is loaded: it chooses this one's GPU."""
    return Launched(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ALONE


def own_rows(
    prompts: Sequence[Sized],
    completions: Sequence[Sized],
    groups: Sequence[int],
    rank: int,
    count: int,
) -> list[bool]:
    """Which rows of a batch this process computes: whole groups, so that a prompt is computed once,
    the largest first to whoever has the fewest tokens. Every process finds the same division."""
    tokens: dict[int, int] = {}
    for group, prompt, completion in zip(groups, prompts, completions, strict=True):
        tokens[group] = tokens.get(group, len(prompt)) + len(completion)
    load = [0] * count
    owner = {}
    for group in sorted(tokens, key=lambda group: (-tokens[group], group)):
        owner[group] = load.index(min(load))
        load[owner[group]] += tokens[group]
    return [owner[group] == rank for group in groups]
