"""One forward pass for scoring and training: each prompt is computed once and shared.

What all prompts of a call have in common is computed once for all of them, the rest of each prompt
once, and the completions attend to both through the key-value cache. Gradients flow back through
the cache into the prompt's states, so the result is that of the plain forward of every sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from transformers.modeling_layers import GradientCheckpointingLayer

from entrograd.errors import InputError
from entrograd.models.cpu.attention import applies_to, decode, full_attention
from entrograd.models.prefix import (
    Tokens,
    common_prefix,
    compute_prefix,
    distinct,
    extend,
    long_tensor,
    pad,
)
from entrograd.numerics.logprobs import logprobs_and_entropies

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TokenValues = tuple[np.ndarray, np.ndarray]  # logprobs and entropies, [T] each

# A completion is computed with longer ones if it is at least this share of the longest among them.
FILLED = 0.75


def completion_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    temperature: float,
    share_prompts: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every completion token under the model.

    Args:
        model: a causal language model of transformers.
        prompts: B prompts of one token or more; equal ones are computed once.
        completions: B completions of one token or more.
        temperature: divides the logits.
        share_prompts: whether each prompt is computed once; None: where it can be and that means
            fewer tokens. The result is the same up to rounding.

    Returns:
        logprobs [N] (differentiable in the model's weights) and entropies [N] (detached), in
        nats, N the completions' tokens one after another.
    """
    targets = long_tensor(np.concatenate([np.asarray(c) for c in completions]), model.device)
    head = output_head(model)
    recomputed = torch.is_grad_enabled() and model.is_gradient_checkpointing
    if share_prompts is None:
        share_prompts = saved_tokens(prompts, completions) > 0
    if share_prompts and shares_prompts(model) and not recomputed:  # a cache can't be recomputed
        hidden = _shared_hidden(model, prompts, completions)
    elif recomputed:
        with _layers_recomputed(model):
            hidden = _plain_hidden(model, prompts, completions)
    else:
        hidden = _plain_hidden(model, prompts, completions)
    return logprobs_and_entropies(hidden, _whole(head, hidden.dtype), targets, temperature)


def score(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    temperature: float,
    token_budget: int,
) -> list[TokenValues]:
    """(logprobs, entropies) of each completion, [T] in nats, without gradients.

    `token_budget` bounds the tokens of one forward pass (padding included). The order of the
    result is that of the arguments.
    """
    result: dict[int, TokenValues] = {}
    with torch.inference_mode():
        for rows in batches(prompts, completions, token_budget):
            batch = [completions[i] for i in rows]
            values = completion_logprobs(model, [prompts[i] for i in rows], batch, temperature)
            result |= zip(rows, per_completion(*values, batch), strict=True)
    return [result[row] for row in range(len(prompts))]


def per_completion(
    logprobs: Tensor, entropies: Tensor, completions: Sequence[Tokens]
) -> list[TokenValues]:
    """What `completion_logprobs` returned, completion by completion."""
    ends = np.cumsum([len(completion) for completion in completions])[:-1]
    both = (values.cpu().numpy() for values in (logprobs, entropies))
    return list(zip(*(np.split(values, ends) for values in both), strict=True))


def batches(
    prompts: Sequence[Tokens], completions: Sequence[Tokens], token_budget: int
) -> Iterator[list[int]]:
    """Rows in batches of at most `token_budget` tokens; equal prompts stay together, and batches
    hold completions of similar length. A single row over the budget is a batch of its own."""
    unique, of_row = distinct(prompts)
    groups: list[list[int]] = [[] for _ in unique]
    for row, number in enumerate(of_row):
        groups[number].append(row)
    batch: list[int] = []
    widest_prompt = widest_completion = count = 0
    for rows in sorted(groups, key=lambda rows: (max(len(completions[i]) for i in rows), rows[0])):
        prompt = prompts[rows[0]]
        for row in rows:
            new = row == rows[0] or not batch
            width = max(widest_prompt, len(prompt))
            length = max(widest_completion, len(completions[row]))
            cost = (count + new) * width + (len(batch) + 1) * length
            if batch and cost > token_budget:
                yield batch
                batch, count, new = [], 0, True
                width, length = len(prompt), len(completions[row])
            batch.append(row)
            count += new
            widest_prompt, widest_completion = width, length
    if batch:
        yield batch


def output_head(model: PreTrainedModel) -> Tensor:
    """[V, D] output weights; InputError for heads that are more than a matrix."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    if getattr(head, "bias", None) is not None or getattr(config, "final_logit_softcapping", None):
        raise InputError(
            f"{config.model_type}: an output head with a bias or soft-capped logits is not "
            "supported; use a model with a plain linear head"
        )
    weight: Tensor = head.weight
    return weight


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether completions can attend to a padded, cached prompt: full attention in every layer
    does that. Weights divided among processes do not: all must make equally many passes."""
    return full_attention(model) and not isinstance(output_head(model), DTensor)


def saved_tokens(prompts: Sequence[Tokens], completions: Sequence[Tokens]) -> int:
    """Token positions, padding included, that the plain forward computes and the shared one does
    not; negative where the shared one computes more."""
    longest = max(len(p) + len(c) - 1 for p, c in zip(prompts, completions, strict=True))
    unique, _ = distinct(prompts)
    begun = common_prefix(unique)
    shared = begun + len(unique) * (max(map(len, unique)) - begun)
    lengths = [len(completion) - 1 for completion in completions]
    for chunk in length_chunks(lengths):
        shared += len(chunk) * lengths[chunk[0]]
    return len(prompts) * longest - shared


def _shared_hidden(
    model: PreTrainedModel, prompts: Sequence[Tokens], completions: Sequence[Tokens]
) -> Tensor:
    """[N, D] the states that predict each completion token, prompts computed once."""
    device = model.device
    unique, of_row = distinct(prompts)
    prefix = compute_prefix(model, unique)
    # the first token of each completion, then the others by chunk
    parts = [prefix.last[long_tensor(of_row, device)]]
    places = [[np.array([row])] for row in range(len(completions))]
    count = len(completions)
    for chunk in length_chunks([len(completion) - 1 for completion in completions]):
        chunk.sort(key=lambda row: of_row[row])
        ids, mask = pad([completions[row][:-1] for row in chunk], device)
        states, _ = extend(model, prefix, [of_row[row] for row in chunk], ids, mask)
        parts.append(states[mask])
        for row in chunk:
            following = count + len(completions[row]) - 1
            places[row].append(np.arange(count, following))
            count = following
    order = np.concatenate([part for row in places for part in row])
    return torch.cat(parts)[long_tensor(order, device)]


def length_chunks(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of similar length together, longest first: none is padded to much more than its own.

    Rows of length 0 are in no chunk. There are at most about log(longest) / log(1 / FILLED) chunks.
    """
    chunks: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if lengths[row] == 0:
            break
        if not chunks or lengths[row] < FILLED * lengths[chunks[-1][0]]:
            chunks.append([])
        chunks[-1].append(row)
    return chunks


def _plain_hidden(
    model: PreTrainedModel, prompts: Sequence[Tokens], completions: Sequence[Tokens]
) -> Tensor:
    """[N, D] the same from the forward of every whole sequence."""
    sequences = [np.concatenate(pair) for pair in zip(prompts, completions, strict=True)]
    ids, mask = pad([sequence[:-1] for sequence in sequences], model.device)
    if applies_to(model):
        states = decode(model, ids, mask, use_cache=False)
    else:
        states = model.get_decoder()(
            input_ids=ids, attention_mask=mask.long(), use_cache=False
        ).last_hidden_state
    position = torch.arange(ids.shape[1], device=model.device)
    starts = long_tensor([len(prompt) - 1 for prompt in prompts], model.device)
    hidden: Tensor = states[mask & (position >= starts[:, None])]
    return hidden


def _whole(head: Tensor, dtype: torch.dtype) -> Tensor:
    """The head, in `dtype`, where processes have a part of it each; its gradients are added up in
    float32."""
    if not isinstance(head, DTensor):
        return head
    copies = head.redistribute(
        placements=[Replicate()], forward_dtype=dtype, backward_dtype=torch.float32
    )
    return copies.to_local(grad_placements=[Partial()])


@contextmanager
def _layers_recomputed(model: PreTrainedModel) -> Iterator[None]:
    """The decoder's layers keep their inputs alone and are computed again in the backward pass.

    Only the layers' own flag changes: what is inside them stays in evaluation mode, without
    dropout, and a layer that decodes with a cache afterwards is not recomputed.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer in layers:
            layer.training = False
