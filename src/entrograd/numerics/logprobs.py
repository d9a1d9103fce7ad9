"""Token log-probabilities and entropies from hidden states: logits live one tile at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entrograd.numerics.precision import accumulation

TOKEN_TILE = 1024
VOCABULARY_TILE = 4096


def logprobs_and_entropies(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    token_tile: int = TOKEN_TILE,
    vocabulary_tile: int = VOCABULARY_TILE,
) -> tuple[Tensor, Tensor]:
    """`log pi(target)` and the entropy of `pi = softmax(hidden @ head.T / temperature)`.

    With z the scaled logits and L = logsumexp(z): log pi = z_target - L and, in nats,
    H = L - sum_v softmax(z)_v z_v (methods.md, notation). The vocabulary is walked in tiles with a
    running maximum, so the extra memory is below that of two (token_tile x vocabulary_tile)
    float32 tiles, forward and backward; the backward pass computes each tile again.

    Args:
        hidden: [N, D] states at the positions that predict `targets`; float32, float64 or bfloat16
            (products are accumulated in float32, or float64 for float64 input).
        head: [V, D] output weights.
        targets: [N] long token ids.
        temperature: divides the logits; > 0.

    Returns:
        logprobs [N], differentiable in `hidden` and `head`; entropies [N], detached. Both in nats,
        float32 (float64 for float64 input).
    """
    assert temperature > 0
    assert hidden.shape[-1] == head.shape[-1]
    logprobs, entropies = _TiledHead.apply(
        hidden, head, targets, temperature, token_tile, vocabulary_tile
    )
    return logprobs, entropies


class _TiledHead(torch.autograd.Function):
    """Forward keeps the normaliser of each token; backward recomputes the softmax tile by tile."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        temperature: float,
        token_tile: int,
        vocabulary_tile: int,
    ) -> tuple[Tensor, Tensor]:
        precision = accumulation(hidden)
        normaliser = torch.empty(len(hidden), dtype=precision, device=hidden.device)
        logprobs, entropies = torch.empty_like(normaliser), torch.empty_like(normaliser)
        tiles = _Tiles(hidden, head, temperature, token_tile, vocabulary_tile)
        for start in range(0, len(hidden), token_tile):
            rows = slice(start, start + token_tile)
            maximum = torch.full_like(normaliser[rows], -torch.inf)
            total, weighted = torch.zeros_like(maximum), torch.zeros_like(maximum)
            target_logit = torch.zeros_like(maximum)
            for low in range(0, len(head), vocabulary_tile):
                tile, spare = tiles.logits(rows, slice(low, low + vocabulary_tile))
                top = torch.maximum(maximum, tile.amax(-1))
                inside = (targets[rows] >= low) & (targets[rows] < low + vocabulary_tile)
                column = (targets[rows] - low).clamp(0, tile.shape[-1] - 1)
                picked = tile.gather(-1, column[:, None])[:, 0]
                target_logit = torch.where(inside, picked, target_logit)
                # sums are kept relative to the running maximum: sum e^(z-m) and sum e^(z-m)(z-m)
                shift = maximum - top
                scale = shift.exp()
                carried = torch.where(total > 0, weighted + total * shift, weighted)
                tile -= top[:, None]
                more, more_weighted = _sums(tile, spare)
                total = total * scale + more
                weighted = torch.where(scale > 0, carried * scale, torch.zeros_like(carried))
                weighted += more_weighted
                maximum = top
            log_total = total.log()
            normaliser[rows] = maximum + log_total
            logprobs[rows] = target_logit - normaliser[rows]
            entropies[rows] = log_total - weighted / total
        ctx.save_for_backward(hidden, head, targets, normaliser)
        ctx.settings = temperature, token_tile, vocabulary_tile
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, normaliser = ctx.saved_tensors
        temperature, token_tile, vocabulary_tile = ctx.settings
        precision = accumulation(hidden)
        grad_hidden = torch.zeros(hidden.shape, dtype=precision, device=hidden.device)
        grad_head = None  # a frozen head's is not computed
        if ctx.needs_input_grad[1]:
            grad_head = torch.zeros(head.shape, dtype=precision, device=head.device)
        tiles = _Tiles(hidden, head, temperature, token_tile, vocabulary_tile)
        for start in range(0, len(hidden), token_tile):
            rows = slice(start, start + token_tile)
            weight = (grad[rows] / temperature)[:, None]
            for low in range(0, len(head), vocabulary_tile):
                columns = slice(low, low + vocabulary_tile)
                # d logprob / d z = onehot(target) - softmax(z)
                tile, spare = tiles.logits(rows, columns)
                tile.sub_(normaliser[rows][:, None]).exp_().mul_(-weight)
                inside = (targets[rows] >= low) & (targets[rows] < low + vocabulary_tile)
                column = (targets[rows] - low).clamp(0, tile.shape[-1] - 1)[:, None]
                tile.scatter_add_(-1, column, weight * inside[:, None])
                if tile.dtype != hidden.dtype:
                    tile = _room(spare, tile, hidden.dtype).copy_(tile)
                grad_hidden[rows] += tile @ head[columns]
                if grad_head is not None:
                    grad_head[columns] += tile.T @ hidden[rows]
        return (
            grad_hidden.to(hidden.dtype),
            None if grad_head is None else grad_head.to(head.dtype),
            None,
            None,
            None,
            None,
        )


class _Tiles:
    """Logits a tile at a time, in buffers of one tile and a half that every tile takes again:
    memory fresh from the system costs more time than what is written to it."""

    def __init__(
        self, hidden: Tensor, head: Tensor, temperature: float, tokens: int, vocabulary: int
    ) -> None:
        self.hidden, self.head, self.temperature = hidden, head, temperature
        tokens, vocabulary = min(tokens, len(hidden)), min(vocabulary, len(head))
        self.tile = hidden.new_empty(tokens * vocabulary, dtype=accumulation(hidden))
        self.spare = hidden.new_empty(-(-tokens // 2) * vocabulary, dtype=self.tile.dtype)

    def logits(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """The tile [T, V], and room for half a one; both until the next tile."""
        hidden, head = self.hidden[rows], self.head[columns]
        tile = self.tile[: len(hidden) * len(head)].view(len(hidden), len(head))
        if tile.dtype == hidden.dtype:
            torch.mm(hidden, head.T, out=tile)
        else:
            tile.copy_(torch.mm(hidden, head.T, out=_room(self.spare, tile, hidden.dtype)))
        return tile if self.temperature == 1 else tile.div_(self.temperature), self.spare


def _sums(tile: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """[T] sum of e^z and of e^z z over a tile's rows z, half the rows at a time."""
    sums = []
    for rows in tile.split(-(-len(tile) // 2)):
        exponent = torch.exp(rows, out=_room(spare, rows, rows.dtype))
        total = exponent.sum(-1)
        sums.append((total, exponent.mul_(rows).sum(-1)))
    first, second = zip(*sums, strict=True)
    return torch.cat(first), torch.cat(second)


def _room(buffer: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The beginning of `buffer`'s memory in the shape of `like` and of `dtype`."""
    return buffer.view(dtype)[: like.numel()].view(like.shape)
