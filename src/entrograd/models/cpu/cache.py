"""The key-value cache of a decoding step: one row per running completion, each of its own length.

The states live in buffers with room to spare: a step writes one place per row and copies nothing
else, a finished row is overwritten by the last one, and waiting prompts enter at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from entrograd.models.cpu.attention import fused, implementation

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

    from entrograd.models.prefix import Prefix

CHUNK = 64  # places a buffer grows by


class _Layer(DynamicLayer):
    """One layer's buffers, [rows to spare, H, places to spare, D]; the keys lie in memory as
    [.., D, places]: queries on them are then a product of two matrices as they lie."""

    keys: Any
    values: Any

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = cache

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write one state per row behind its others; all states of the rows so far."""
        rows, width = len(self.cache.lengths), self.cache.width
        keys, values = self.keys.transpose(-1, -2), self.values  # as they lie
        keys.view(-1).index_copy_(0, self.cache.places(keys, -1), key_states.flatten())
        by_place = values.view(-1, values.shape[-1])
        by_place.index_copy_(0, self.cache.places(values, -2), value_states.flatten(0, 2))
        return self.keys[:rows, :, :width], self.values[:rows, :, :width]

    def reserve(self, rows: int, places: int, keys: Tensor, values: Tensor) -> None:
        """Room for `rows` rows of `places` states in the dtype and shape of those given."""
        have = self.keys.shape if self.is_initialized else (0, 0, 0, 0)
        if have[0] >= rows and have[2] >= places:
            return
        shape = (max(rows, have[0]), keys.shape[1])
        width = max(places, have[2])
        grown_keys = keys.new_zeros(*shape, keys.shape[-1], width).transpose(-1, -2)
        grown_values = values.new_zeros(*shape, width, values.shape[-1])
        if self.is_initialized:
            grown_keys[: have[0], :, : have[2]] = self.keys
            grown_values[: have[0], :, : have[2]] = self.values
        self.keys, self.values = grown_keys, grown_values
        self.is_initialized = True


class RowCache(Cache):
    """Key-value cache of rows of different lengths.

    lengths: [R] long, cached states of each row; `width` is the widest row's after the next step.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.buffers = [_Layer(self) for _ in range(layers)]
        super().__init__(layers=list(self.buffers))
        self.lengths = torch.zeros(0, dtype=torch.long, device=device)
        self.width = 0
        self._places: dict[tuple[int, ...], Tensor] = {}  # of this step

    def append(self, prefix: Prefix, rows: Tensor) -> None:
        """New rows, each a copy of the computed prompt at `rows`."""
        old, count = len(self.lengths), len(rows)
        self.lengths = torch.cat([self.lengths, prefix.lengths[rows]])
        places = prefix.mask.shape[1]
        self.reserve(places, prefix.states)
        for layer, (keys, values) in zip(self.buffers, prefix.states, strict=True):
            layer.keys[old : old + count, :, :places] = keys[rows]
            layer.values[old : old + count, :, :places] = values[rows]

    def reserve(self, places: int, like: Sequence[tuple[Tensor, Tensor]] | None = None) -> None:
        """Room for `places` states in every row."""
        places = -(-places // CHUNK) * CHUNK
        like = like or [(layer.keys, layer.values) for layer in self.buffers]
        for layer, (keys, values) in zip(self.buffers, like, strict=True):
            layer.reserve(len(self.lengths), places, keys, values)

    def drop(self, rows: list[int]) -> list[int]:
        """Remove rows. Returns the order left: at each place the former row that stands there."""
        order = list(range(len(self.lengths)))
        for row in sorted(rows, reverse=True):
            order[row] = order[-1]
            order.pop()
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        if moved:
            into, source = torch.tensor(moved, device=self.lengths.device).T
            width = int(self.lengths.max())  # `self.width` is the last step's: rows may be newer
            for layer in self.buffers:
                layer.keys[into, :, :width] = layer.keys[source, :, :width]
                layer.values[into, :, :width] = layer.values[source, :, :width]
        self.lengths = self.lengths[torch.tensor(order, dtype=torch.long)]
        return order

    @contextmanager
    def step(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """One decoding step, on the mask [R, 1, 1, W] it yields: 0 at a row's states, the new one
        among them, and -inf beyond."""
        self.width = -(-(int(self.lengths.max()) + 1) // CHUNK) * CHUNK
        self.reserve(self.width)
        self._places.clear()
        place = torch.arange(self.width, device=self.lengths.device)
        mask = torch.zeros(len(self.lengths), self.width, dtype=dtype, device=place.device)
        mask.masked_fill_(place > self.lengths[:, None], -torch.inf)
        yield mask[:, None, None]
        self.lengths = self.lengths + 1

    def places(self, buffer: Tensor, of_places: int) -> Tensor:
        """[R * N] where the step's states go in a buffer [rows to spare, .., places to spare, ..]
        laid flat up to dimension `of_places`; N vectors or numbers per row."""
        shape = buffer.shape[1 : of_places + buffer.dim() + 1]
        if shape not in self._places:
            rows, count = len(self.lengths), shape[:-1].numel()
            first = torch.arange(rows * count, device=buffer.device).view(rows, count) * shape[-1]
            self._places[shape] = (first + self.lengths[:, None]).flatten()
        return self._places[shape]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - transformers' signature
        """States of the widest row."""
        return self.width


def grouped_attention(
    module: Module,  # noqa: ARG001 - transformers' signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of one new token per row. The query heads that share a key head are taken as that
    head's queries, so no key is ever repeated. Two plain products: torch's fused kernels are made
    for many queries and take twice as long for one.

    query [R, H * G, 1, D]; key, value [R, H, W, D]; attention_mask [R, 1, 1, W], added to the
    scores; returns [R, 1, H * G, D].
    """
    rows, heads, _one, size = query.shape
    grouped = query.reshape(rows * key.shape[1], -1, size)
    mask = attention_mask.expand(-1, key.shape[1], -1, -1).flatten(0, 1)
    scale = size**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(mask, grouped, key.flatten(0, 1).transpose(-1, -2), alpha=scale)
    output = scores.softmax(-1) @ value.flatten(0, 1)
    return output.view(rows, 1, heads, -1), None


AttentionInterface.register("entrograd_grouped", grouped_attention)


def grouped_decoding(model: PreTrainedModel) -> AbstractContextManager[None]:
    """The model's attention is `grouped_attention`, if it calls attention through transformers'
    interface, as plain softmax attention does."""
    return implementation(model, "entrograd_grouped") if fused(model) else nullcontext()
