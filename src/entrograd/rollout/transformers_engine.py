"""Generation with transformers: prompts computed once, finished completions leave the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entrograd.models.forward import compute_prefix, output_head
from entrograd.models.load import context_length, policy_version
from entrograd.params import Sampling
from entrograd.progress import Progress
from entrograd.rollout.engine import Completion, Request, check_requests, cut_at_stop
from entrograd.rollout.sampler import draw, uniforms

# Completions leave the cache once this share of the rows is finished: compacting copies it.
COMPACT_SHARE = 0.25
# A stop string is looked for in the text of this many last tokens, and of its own length more.
STOP_WINDOW = 8


class TransformersEngine:
    """The Engine protocol on a model of transformers, shared with whoever trains it.

    `token_budget` bounds the cached tokens (prompt and new) of one batch.
    """

    def __init__(self, model: Any, tokenizer: Any, token_budget: int) -> None:
        self.model, self.tokenizer, self.token_budget = model, tokenizer, token_budget
        self.policy_version = policy_version(model)
        self._ends = torch.tensor(sorted(_end_tokens(model, tokenizer)), device=model.device)

    def update_weights(self, model: Any) -> None:
        """Copy the weights of `model` (nothing to copy where it is the engine's own) and take the
        version of what it now holds."""
        if model is not self.model:
            self.model.load_state_dict(model.state_dict())
        self.policy_version = policy_version(self.model)

    def close(self) -> None:
        """Nothing is held beyond the model."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        seed: int,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """One completion a request, in order; InputError names a prompt the context cannot hold."""
        check_requests(requests, sampling, context_length(self.model))
        completions: list[Completion | None] = [None] * len(requests)
        with torch.inference_mode():
            for rows in self._batches(requests, sampling.max_new_tokens):
                chosen = [requests[row] for row in rows]
                for row, completion in zip(rows, self._decode(chosen, sampling, seed), strict=True):
                    completions[row] = completion
                if progress:
                    progress.advance(len(rows))
        return [completion for completion in completions if completion is not None]

    def _batches(self, requests: Sequence[Request], new: int) -> Iterator[list[int]]:
        """Rows by prompt length, then prompt, so that a group is computed once, in budget."""
        order = sorted(
            range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), requests[i].prompt_id)
        )
        batch: list[int] = []
        for row in order:
            if batch and (len(batch) + 1) * (len(requests[row].prompt_ids) + new) > (
                self.token_budget
            ):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _decode(
        self, requests: Sequence[Request], sampling: Sampling, seed: int
    ) -> list[Completion]:
        device, decoder, head = self.model.device, self.model.get_decoder(), output_head(self.model)
        new = sampling.max_new_tokens
        noise = torch.from_numpy(
            np.stack([uniforms(seed, r.prompt_id, r.sample_index, new) for r in requests])
        ).to(device)
        unique = list(dict.fromkeys(request.prompt_ids for request in requests))
        index = {prompt: i for i, prompt in enumerate(unique)}
        rows = torch.tensor([index[r.prompt_ids] for r in requests], device=device)
        prefix = compute_prefix(self.model, unique).select(rows)
        cache, mask, hidden = prefix.cache, prefix.mask, prefix.last
        lengths = prefix.lengths
        alive = torch.arange(len(requests), device=device)  # request of each row of the cache
        running = torch.ones(len(requests), dtype=torch.bool, device=device)  # by row
        tokens = torch.zeros(len(requests), new, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(requests), new, device=device)
        counts = torch.zeros(len(requests), dtype=torch.long, device=device)
        stopped = [False] * len(requests)
        for position in range(new):
            logits = hidden @ head.T
            if position < sampling.min_new_tokens:
                logits[:, self._ends] = -torch.inf
            drawn, drawn_logprobs = draw(logits, noise[alive, position], sampling)
            live = alive[running]
            tokens[live, position] = drawn[running]
            logprobs[live, position] = drawn_logprobs[running]
            counts[live] += 1
            ended = torch.isin(drawn, self._ends)
            if sampling.stop and position >= sampling.min_new_tokens:
                text_ended = self._stops(tokens, alive[running].tolist(), position, sampling.stop)
                ended[running] |= torch.tensor(text_ended, dtype=torch.bool, device=device)
            for request in alive[running & ended].tolist():
                stopped[request] = True
            running &= ~ended
            if position + 1 == new or not running.any():
                break
            if running.float().mean() <= 1 - COMPACT_SHARE:
                keep = running.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                alive, mask, lengths, drawn = alive[keep], mask[keep], lengths[keep], drawn[keep]
                running = running[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
            hidden = decoder(
                input_ids=drawn[:, None],
                attention_mask=mask.long(),
                position_ids=(lengths + position)[:, None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        return [
            self._completion(ids[:count], values[:count], stop, sampling)
            for ids, values, count, stop in zip(
                tokens.tolist(), logprobs.tolist(), counts.tolist(), stopped, strict=True
            )
        ]

    def _stops(
        self, tokens: Tensor, requests: list[int], position: int, stop: Sequence[str]
    ) -> list[bool]:
        """Whether a stop string ends each request's text; it may span tokens."""
        window = STOP_WINDOW + max(len(text) for text in stop)
        start = max(0, position + 1 - window)
        before = self.tokenizer.batch_decode(tokens[requests, start:position])
        texts = self.tokenizer.batch_decode(tokens[requests, start : position + 1])
        return [
            cut_at_stop(text, stop, len(known)) is not None
            for known, text in zip(before, texts, strict=True)
        ]

    def _completion(
        self, ids: list[int], logprobs: list[float], stopped: bool, sampling: Sampling
    ) -> Completion:
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        text = decode(ids)
        first = len(decode(ids[: sampling.min_new_tokens]))
        cut = cut_at_stop(text, sampling.stop, first)
        return Completion(
            completion_ids=tuple(ids),
            text=text if cut is None else cut,
            sampling_logprobs=tuple(logprobs),
            finish_reason="stop" if stopped else "length",
        )


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}
