"""Causal attention on a CPU, of completions on prompts that are computed once, with gradients.

Plain attention wants a prompt's keys repeated for every completion and every query head. Here the
completions of a prompt are more queries on the one copy of its keys. Scores exist one block at a
time, small enough for a processor's cache: matrix products in the model's own precision, softmaxes
in float32. The backward pass computes them again. Torch's fused attention on a CPU takes
eight times as long for a backward pass in bfloat16.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from entrograd.numerics.precision import accumulation

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

BLOCK_QUERIES = 128  # neighbouring queries of a completion: those before them see no later key
BLOCK_SCORES = 1 << 18  # of all heads: a megabyte in float32


class Rows(NamedTuple):
    """Neighbouring rows of the batch that follow the same prompt."""

    rows: slice
    prompt: int
    length: int  # of the prompt, in tokens


def rows_by_prompt(prompt_of_row: Sequence[int], lengths: Sequence[int]) -> list[Rows]:
    """The rows of each prompt; `prompt_of_row` is in order, `lengths` are the prompts'."""
    runs, start = [], 0
    for prompt, rows in groupby(prompt_of_row):
        stop = start + sum(1 for _ in rows)
        runs.append(Rows(slice(start, stop), prompt, lengths[prompt]))
        start = stop
    return runs


class SharedAttention(torch.autograd.Function):
    """softmax(scale q k') v of B completions on their prompts and, causally, on themselves.

    query [B, H * G, T, D], G query heads per key head; keys, values [B, H, T, D], the completions'
    own; prompt_keys, prompt_values [Q, H, P, D]; `where` says which rows follow which prompt.
    Returns [B, H * G, T, D].
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        prompt_keys: Tensor,
        prompt_values: Tensor,
        where: Sequence[Rows],
        scale: float,
    ) -> Tensor:
        batch, heads, places, size = query.shape
        output = query.new_empty(batch, places, heads, size).transpose(1, 2)
        for block in _blocks(where, query, keys):
            weights = block.weights(query, keys, prompt_keys, scale).to(query.dtype)
            block.put(output, block.read(weights, values, prompt_values))
        ctx.save_for_backward(query, keys, values, prompt_keys, prompt_values, output)
        ctx.where, ctx.scale = where, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, prompt_keys, prompt_values, output = ctx.saved_tensors
        precision, states = accumulation(query), (keys, values, prompt_keys, prompt_values)
        grad_query = torch.empty_like(query)
        grads = [torch.zeros_like(of, dtype=precision) for of in states]
        of_keys, of_values, of_prompt_keys, of_prompt_values = grads
        for block in _blocks(ctx.where, query, keys):
            weights = block.weights(query, keys, prompt_keys, ctx.scale)
            coming = block.take(grad)
            # d scores = scale * weights * (d weights - sum_D(d output * output))
            inner = (coming.to(precision) * block.take(output)).sum(-1, keepdim=True)
            change = block.products(coming, values, prompt_values)
            change.sub_(inner).mul_(weights).mul_(ctx.scale)
            change, weights = change.to(query.dtype), weights.to(query.dtype)
            block.put(grad_query, block.read(change, keys, prompt_keys))
            block.add(of_keys, of_prompt_keys, change, block.take(query))
            block.add(of_values, of_prompt_values, weights, coming)
        return grad_query, *(gradient.to(query.dtype) for gradient in grads), None, None


@dataclass(frozen=True)
class _Block:
    """Queries `first` to `last` of n neighbouring rows of one prompt, R = n * G * (last - first)
    of them per key head; they see `length` states of the prompt and `last` of their own."""

    rows: slice
    prompt: int
    length: int
    first: int
    last: int
    heads: int  # H, of the keys

    def take(self, states: Tensor) -> Tensor:
        """[B, H * G, T, D] -> [H, R, D], the block's queries by key head."""
        taken = states[self.rows, :, self.first : self.last].unflatten(1, (self.heads, -1))
        return taken.transpose(0, 1).flatten(1, 3)

    def put(self, states: Tensor, values: Tensor) -> None:
        """The inverse of `take`: write [H, R, D] into [B, H * G, T, D]."""
        into = states[self.rows, :, self.first : self.last]
        shape = (self.heads, len(into), -1, *into.shape[2:])
        into.copy_(values.view(shape).transpose(0, 1).flatten(1, 2))

    def products(self, queries: Tensor, states: Tensor, prompt_states: Tensor) -> Tensor:
        """[H, R, length + last] products of queries [H, R, D] with all states they may see, in
        the precision of sums."""
        own = self._own(states)
        products = torch.empty(
            *queries.shape[:2],
            self.length + self.last,
            dtype=accumulation(queries),
            device=queries.device,
        )
        if self.length:
            seen = prompt_states[self.prompt, :, : self.length]
            products[..., : self.length] = queries @ seen.transpose(-1, -2)
        by_row = queries.view(len(own), -1, queries.shape[-1])
        own_products = by_row @ own.transpose(-1, -2)
        products[..., self.length :] = own_products.view(*queries.shape[:2], -1)
        return products

    def weights(self, query: Tensor, keys: Tensor, prompt_keys: Tensor, scale: float) -> Tensor:
        """[H, R, length + last] the attention weights."""
        scores = self.products(self.take(query), keys, prompt_keys).mul_(scale)
        count = self.last - self.first
        later = torch.ones(count, count, dtype=torch.bool, device=query.device).triu_(1)
        newest = scores.unflatten(1, (-1, count))[..., self.length + self.first :]
        newest.masked_fill_(later, -torch.inf)
        return scores.softmax(-1)

    def read(self, weights: Tensor, states: Tensor, prompt_states: Tensor) -> Tensor:
        """[H, R, D] weights [H, R, length + last] times the states."""
        own = self._own(states)
        by_row = weights[..., self.length :].unflatten(1, (len(own) // self.heads, -1))
        read = torch.bmm(by_row.flatten(0, 1), own).view(*weights.shape[:2], -1)
        if self.length:
            seen = prompt_states[self.prompt, :, : self.length]
            read = torch.baddbmm(read, weights[..., : self.length], seen)
        return read

    def add(self, states: Tensor, prompt_states: Tensor, weights: Tensor, queries: Tensor) -> None:
        """Add weights' [length + last, R] queries [H, R, D] to the gradients of the states."""
        count = self.rows.stop - self.rows.start
        by_row = weights[..., self.length :].unflatten(1, (count, -1)).flatten(0, 1)
        change = by_row.transpose(-1, -2) @ queries.view(len(by_row), -1, queries.shape[-1])
        change = change.unflatten(0, (self.heads, count)).transpose(0, 1)
        states[self.rows, :, : self.last] += change
        if self.length:
            of_prompt = weights[..., : self.length].transpose(-1, -2) @ queries
            prompt_states[self.prompt, :, : self.length] += of_prompt

    def _own(self, states: Tensor) -> Tensor:
        """[B, H, T, D] -> [H * n, last, D], the rows' own states so far."""
        return states[self.rows, :, : self.last].transpose(0, 1).flatten(0, 1)


def _blocks(where: Sequence[Rows], query: Tensor, keys: Tensor) -> Iterator[_Block]:
    """All queries of all rows, a block at a time: of as many rows as BLOCK_SCORES allows."""
    places = query.shape[2]
    for rows, prompt, length in where:
        for first in range(0, places, BLOCK_QUERIES):
            last = min(first + BLOCK_QUERIES, places)
            scores = query.shape[1] * (last - first) * (length + last)
            step = max(1, BLOCK_SCORES // scores)
            for start in range(rows.start, rows.stop, step):
                some = slice(start, min(start + step, rows.stop))
                yield _Block(some, prompt, length, first, last, keys.shape[1])


class _States(NamedTuple):
    """What a layer's cache hands its attention in place of the keys or the values."""

    own: Tensor  # [B, H, T, D]
    prompt: Tensor  # [Q, H, P, D]
    where: Sequence[Rows]


class _Layer(DynamicLayer):
    """One layer: the prompts' states, and room for those computed after them."""

    def __init__(self, keys: Tensor, values: Tensor, where: Sequence[Rows]) -> None:
        super().__init__()
        self.prompt, self.where = (keys, values), where

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> Any:
        """Keep the rows' own states; theirs and the prompts'."""
        self.keys, self.values = key_states, value_states
        keys, values = self.prompt
        return _States(key_states, keys, self.where), _States(value_states, values, self.where)


def after(states: Sequence[tuple[Tensor, Tensor]], where: Sequence[Rows]) -> Cache:
    """A cache for completions that follow prompts of these (keys, values), one pair per layer; a
    forward pass leaves the completions' own in its layers."""
    return Cache(layers=[_Layer(keys, values, where) for keys, values in states])


def _attention(
    module: Module,  # noqa: ARG001 - transformers' signature
    query: Tensor,
    key: _States,
    value: _States,
    attention_mask: Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """`SharedAttention` as transformers calls attention: query [B, H * G, T, D], returns
    [B, T, H * G, D]. Keys and values that are tensors [B, H, T, D] are those of whole sequences.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Tensor):
        where = [Rows(slice(0, len(query)), 0, 0)]
        key, value = (_States(own, own[:1, :, :0], where) for own in (key, value))
    output = SharedAttention.apply(
        query, key.own, value.own, key.prompt, value.prompt, key.where, scale
    )
    return output.transpose(1, 2), None


AttentionInterface.register("entrograd_shared", _attention)


def full_attention(model: PreTrainedModel) -> bool:
    """Whether all layers attend to all earlier tokens: no sliding windows, no recurrent states."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"]
    return all(kind == "full_attention" for kind in kinds)


def fused(model: PreTrainedModel) -> bool:
    """Whether the model was set to torch's fused attention, which ours can replace (and may be
    replacing right now, in another thread)."""
    name: str = model.get_decoder().config._attn_implementation
    return name == "sdpa" or name.startswith("entrograd_")


def applies_to(model: PreTrainedModel) -> bool:
    """Whether the model's attention can be this one: full attention on a CPU, if torch's own
    was chosen and no backward pass runs the layers again."""
    return (
        model.device.type == "cpu"
        and fused(model)
        and full_attention(model)
        and not (torch.is_grad_enabled() and model.is_gradient_checkpointing)
    )


_switching = threading.RLock()


@contextmanager
def implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model's attention is the one registered as `name`, for one thread at a time."""
    config = model.get_decoder().config
    with _switching:
        before = config._attn_implementation
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = before


def decode(model: PreTrainedModel, ids: Tensor, mask: Tensor, **arguments: object) -> Tensor:
    """[B, T, D] the decoder's states on ids [B, T], real where `mask`, by this attention.

    `arguments` are the decoder's others. It gets a mask of four dimensions, which transformers
    passes on and nothing reads: causal attention sees no padding on the right.
    """
    decoder = model.get_decoder()
    with implementation(model, "entrograd_shared"):
        output = decoder(input_ids=ids, attention_mask=mask[:, None, None], **arguments)
    states: Tensor = output.last_hidden_state
    return states
