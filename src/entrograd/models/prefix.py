"""Prompts computed once: their keys and values, what is common to all of them but once.

Shapes: Q prompts of up to P tokens, B rows that go on behind them with T tokens, H key heads, D the
size of a state or of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from entrograd.models.cpu.attention import after, applies_to, decode, rows_by_prompt

Tokens = Sequence[int]


def common_prefix(prompts: Sequence[Tokens]) -> int:
    """How many leading tokens all prompts share, at most one less than the shortest has."""
    ordered = sorted(tuple(prompt) for prompt in prompts)
    pairs = zip(ordered[0], ordered[-1], strict=False)  # all others lie between these two
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return min(shared, min(len(prompt) for prompt in prompts) - 1)


@dataclass(frozen=True)
class Prefix:
    """Q computed prompts, padded on the right to P tokens."""

    states: list[tuple[Tensor, Tensor]]  # a layer's keys and values, [Q, H, P, D] each
    last: Tensor  # [Q, D] state at each prompt's last token
    mask: Tensor  # [Q, P] bool, False at padding
    lengths: Tensor  # [Q] prompt lengths


def compute_prefix(model: Any, prompts: Sequence[Tokens]) -> Prefix:
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
    model: Any, prefix: Prefix | None, prompts: list[int], ids: Tensor, mask: Tensor
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
    width = max(len(sequence) for sequence in sequences)
    ids = long_tensor(
        [[*sequence, *[0] * (width - len(sequence))] for sequence in sequences], device
    )
    lengths = long_tensor([len(sequence) for sequence in sequences], device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


def long_tensor(values: Any, device: torch.device) -> Tensor:
    """Values as int64."""
    return torch.tensor(values, dtype=torch.long, device=device)
