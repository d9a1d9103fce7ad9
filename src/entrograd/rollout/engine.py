"""What every generation engine offers. Two engines behind one protocol give the same table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from entrograd.params import Sampling


@dataclass(frozen=True)
class Request:
    """One completion to draw. The noise is a function of (seed, prompt_id, sample_index, position)
    alone: batch, order and shard never change what is drawn."""

    prompt_id: str
    sample_index: int
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """One completion: its tokens (the end-of-sequence token or the tokens of a stop string
    included), their logprobs under the distribution really sampled from, and why it ended."""

    completion_ids: tuple[int, ...]
    text: str
    sampling_logprobs: tuple[float, ...]
    finish_reason: str  # stop | length


class Engine(Protocol):
    """A language model that draws completions and can be given new weights."""

    policy_version: str

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, seed: int
    ) -> list[Completion]:
        """One completion a request, in order. InputError names a prompt too long for the model."""

    def update_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take these weights and a new policy_version."""
