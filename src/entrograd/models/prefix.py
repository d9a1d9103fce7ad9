"""Prompts computed once: their keys and values, what is common to all of them but once.

Shapes: Q prompts of up to P tokens, B rows that go on behind them with T tokens, H key heads, D the
size of a state or of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from entrograd.models.cpu.attention import after, applies_to, decode, rows_by_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tokens = Sequence[int] | np.ndarray


def distinct(prompts: Sequence[Tokens]) -> tuple[list[Tokens], list[int]]:
    """The different prompts by first appearance, and the index of each prompt among them."""
    numbers: dict[bytes, int] = {}
    found: list[Tokens] = []
    of_row = []
    for prompt in prompts:
        number = numbers.setdefault(np.asarray(prompt, np.int32).tobytes(), len(found))
        if number == len(found):
            found.append(prompt)
        of_row.append(number)
    return found, of_row


def common_prefix(prompts: Sequence[Tokens]) -> int:
    """How many leading tokens all prompts share, at most one less than the shortest has."""
    shared = np.asarray(prompts[0])
    for prompt in prompts[1:]:
        width = min(len(shared), len(prompt))
        differs = shared[:width] != np.asarray(prompt)[:width]
        shared = shared[: int(differs.argmax()) if differs.any() else width]
    return min(len(shared), min(map(len, prompts)) - 1)


@dataclass(frozen=True)
class Prefix:
    """Q computed prompts, padded on the right to P tokens."""

    states: list[tuple[Tensor, Tensor]]  # a layer's keys and values, [Q, H, P, D] each
    last: Tensor  # [Q, D] state at each prompt's last token
    mask: Tensor  # [Q, P] bool, False at padding
    lengths: Tensor  # [Q] prompt lengths


def compute_prefix(model: PreTrainedModel, prompts: Sequence[Tokens]) -> Prefix:
    """The shared beginning of all prompts once, then each prompt's rest, padded on the right."""
    device, count = model.device, len(prompts)
    shared = common_prefix(prompts)
    beginning = None
    if shared:
        ids, mask = pad([prompts[0][:shared]], device)
        last, states = extend(model, None, [0], ids, mask)
        beginning = Prefix(states, last[:, -1], mask, mask.sum(-1))
    ids, mask = pad([prompt[shared:] for prompt in prompts], device)
    hidden, states = extend(model, beginning, [0] * count, ids, mask)
    if beginning:
        both = zip(beginning.states, states, strict=True)
        states = [
            (_behind(keys, more_keys), _behind(values, more_values))
            for (keys, values), (more_keys, more_values) in both
        ]
        mask = torch.cat([beginning.mask.expand(count, -1), mask], -1)
    lengths = mask.sum(-1)
    last = hidden[torch.arange(count, device=device), lengths - shared - 1]
    return Prefix(states, last, mask, lengths)


def _behind(one: Tensor, many: Tensor) -> Tensor:
    """States [1, H, P, D], then [Q, H, R, D] of each row."""
    return torch.cat([one.expand(len(many), -1, -1, -1), many], 2)


def extend(
    model: PreTrainedModel, prefix: Prefix | None, prompts: list[int], ids: Tensor, mask: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Compute `ids` [B, T], real where `mask`, behind the prefix's `prompts`, B ascending indexes.

    Returns [B, T, D] and the new tokens' keys and values [B, H, T, D] of each layer.
    """
    device = model.device
    places = torch.arange(ids.shape[1], device=device).expand_as(ids)
    rows = long_tensor(prompts, device)
    positions = places + prefix.lengths[rows, None] if prefix else places
    cache: Any = DynamicCache()
    if applies_to(model):
        if prefix:
            cache = after(prefix.states, rows_by_prompt(prompts, prefix.lengths.tolist()))
        hidden = decode(
            model, ids, mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
    else:
        seen = torch.ones_like(mask)  # causal: padding on the right is never seen
        if prefix:
            for layer, (keys, values) in enumerate(prefix.states):
                cache.update(keys[rows], values[rows], layer)
            seen = torch.cat([prefix.mask[rows], seen], -1)
        hidden = model.get_decoder()(
            input_ids=ids,
            attention_mask=seen.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
    length = ids.shape[1]
    states = [(layer.keys[:, :, -length:], layer.values[:, :, -length:]) for layer in cache.layers]
    return hidden, states


def pad(sequences: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [B, T] (0 at padding, on the right) and mask [B, T] bool."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    lengths = long_tensor([len(sequence) for sequence in sequences], device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    return long_tensor(ids, device), mask


def long_tensor(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """Values as int64."""
    return torch.tensor(values, dtype=torch.long, device=device)
