"""Generation with transformers: prompts computed once, finished completions leave the batch,
waiting ones take their places.

What is drawn. The noise of a token is a function of (seed, prompt_id, sample_index, position)
alone, exactly. The logits it meets are computed in batches, and the last bits of a float32 sum
depend on the batch's shape: the same requests, in any order, under the same token budget and number
of threads give the same bits; other shards or budgets give the same tokens unless a draw falls
within that rounding (some 1e-6 of the probability mass) of the border between two tokens.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from entrograd.errors import InputError, out_of_memory
from entrograd.models.cpu.cache import RowCache, grouped_decoding
from entrograd.models.cpu.products import Product, inference
from entrograd.models.forward import output_head
from entrograd.models.load import context_length, policy_version
from entrograd.models.prefix import compute_prefix
from entrograd.pipeline.progress import Progress
from entrograd.rollout.engine import (
    EngineError,
    Request,
    Sampled,
    check_requests,
    cut_at_stop,
    finish,
    max_new_tokens,
)
from entrograd.rollout.sampler import draw, uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from entrograd.data.prompt import Tokenizer
    from entrograd.rollout.params import Sampling

log = logging.getLogger("entrograd")

# Waiting prompts are computed once this fraction of the rows is free: a few at a time costs more.
REFILL_SHARE = 0.25
# A stop string is looked for in the text of this many last tokens, and of its own length more.
STOP_WINDOW = 8


class TransformersEngine:
    """The Engine protocol on a model of transformers, which a trainer in this process may share.

    `token_budget` bounds the cached tokens: rows times the longest prompt with all its new tokens.
    Where memory does not suffice it is halved, down to a completion at a time.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, token_budget: int) -> None:
        self.model, self.tokenizer, self.token_budget = model, tokenizer, token_budget
        self.policy_version = policy_version(model)
        ends = sorted(_end_tokens(model, tokenizer))
        self._ends = torch.tensor(ends, dtype=torch.long, device=model.device)

    def update_weights(self, model: PreTrainedModel) -> None:
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
    ) -> list[Sampled]:
        """One completion a request, in order (see the Engine protocol)."""
        check_requests(requests, sampling, context_length(self.model))
        _check_attention(self.model, requests, sampling)
        decoding = _Decoding(self, requests, sampling, seed, progress)
        while True:
            try:
                with inference(self.model) as head:
                    decoding.run(head, self.token_budget)
                return decoding.completions()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                rows = decoding.rows
            if rows <= 1:
                raise EngineError(
                    f"out of memory with {rows} completion of up to "
                    f"{sampling.max_new_tokens} new tokens at a time; lower max_new_tokens, take "
                    "a smaller model or a machine with more memory"
                )
            self.token_budget //= 2
            log.warning(
                "out of memory with %d completions at a time: going on with a token budget of %d; "
                "set execution.rollout.token_budget to it",
                rows,
                self.token_budget,
            )


class _Decoding:
    """The state of one `generate`: what each request has so far, and which row computes which."""

    def __init__(
        self,
        engine: TransformersEngine,
        requests: Sequence[Request],
        sampling: Sampling,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.engine, self.requests, self.sampling = engine, requests, sampling
        self.seed, self.progress = seed, progress
        self.device = engine.model.device
        self.limits = torch.tensor([max_new_tokens(r, sampling) for r in requests])
        width = int(self.limits.max()) if requests else 0
        self.tokens = torch.zeros(len(requests), width, dtype=torch.long)
        self.logprobs = torch.zeros(len(requests), width)
        self.counts = torch.zeros(len(requests), dtype=torch.long)
        self.reasons: dict[int, str] = {}
        self.rows = 0  # computed at once, most recently

    def run(self, head: Product, token_budget: int) -> None:
        """Draw all requests that have no completion yet; `head` gives the logits of states."""
        model, sampling = self.engine.model, self.sampling
        weight = output_head(model)
        waiting = self._units(token_budget)
        alive = torch.zeros(0, dtype=torch.long)  # the request of each row
        noise = np.zeros((0, self.tokens.shape[1]))
        cache = RowCache(model.config.get_text_config().num_hidden_layers, self.device)
        hidden = torch.zeros(0, weight.shape[1], dtype=weight.dtype, device=self.device)
        full = 0
        while waiting or len(alive):
            if waiting and len(alive) <= (1 - REFILL_SHARE) * full:
                entering = self._enter(waiting, alive, token_budget)
                self.rows = full = len(alive) + len(entering)
                if entering:
                    hidden = torch.cat([hidden, self._prefill(cache, entering)])
                    alive = torch.cat([alive, torch.tensor(entering)])
                    noise = np.concatenate([noise, [self._noise(i) for i in entering]])
            logits = head(hidden)
            position = self.counts[alive]
            early = position < sampling.min_new_tokens
            if early.any():
                logits[early.nonzero().to(self.device), self.engine._ends] = -torch.inf
            uniform = torch.from_numpy(noise[np.arange(len(alive)), position.numpy()])
            drawn, logprobs = draw(logits, uniform.to(self.device), sampling)
            ended = self._record(alive, drawn.cpu(), logprobs.cpu())
            if ended:
                order = torch.tensor(cache.drop(ended), dtype=torch.long)
                alive, noise, drawn = alive[order], noise[order.numpy()], drawn[order]
            hidden = self._step(cache, drawn) if len(alive) else hidden[:0]

    def completions(self) -> list[Sampled]:
        """Every request's completion, in order."""
        return [self._completion(i) for i in range(len(self.requests))]

    def _units(self, token_budget: int) -> deque[list[int]]:
        """Requests without a completion, those of a prompt together as far as the budget allows:
        longest first, so that no long one is left to run alone."""

        def total(i: int) -> int:
            return len(self.requests[i].prompt_ids) + int(self.limits[i])

        groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for i, request in enumerate(self.requests):
            if i not in self.reasons:
                groups.setdefault((request.prompt_id, request.prompt_ids), []).append(i)
        units: list[tuple[int, tuple[str, tuple[int, ...]], list[int]]] = []
        for key, members in groups.items():
            members.sort(key=lambda i: (-total(i), self.requests[i].sample_index))
            most = max(1, token_budget // total(members[0]))
            units += [
                (-total(members[start]), key, members[start : start + most])
                for start in range(0, len(members), most)
            ]
        return deque(members for *_, members in sorted(units))

    def _enter(self, waiting: deque[list[int]], alive: Tensor, token_budget: int) -> list[int]:
        """The requests to compute next, at least one where nothing runs."""
        lengths = [len(r.prompt_ids) for r in self.requests]
        widest = max((lengths[i] + int(self.limits[i]) for i in alive.tolist()), default=0)
        entering: list[int] = []
        while waiting:
            unit = waiting[0]
            width = max(widest, *(lengths[i] + int(self.limits[i]) for i in unit))
            count = len(alive) + len(entering)
            if count and (count + len(unit)) * width > token_budget:
                break
            entering += waiting.popleft()
            widest = width
        return entering

    def _prefill(self, cache: RowCache, entering: list[int]) -> Tensor:
        """Compute each prompt of `entering` once, give every request its row; its states [N, D]."""
        prompts = [self.requests[i].prompt_ids for i in entering]
        unique = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
        prefix = compute_prefix(self.engine.model, list(unique))
        rows = torch.tensor([unique[prompt] for prompt in prompts], device=self.device)
        cache.append(prefix, rows)
        return prefix.last[rows]

    def _step(self, cache: RowCache, drawn: Tensor) -> Tensor:
        """[R, D] the states after the drawn tokens [R]."""
        model = self.engine.model
        with grouped_decoding(model), cache.step(model.dtype) as mask:
            states: Tensor = model.get_decoder()(
                input_ids=drawn[:, None],
                attention_mask=mask,
                position_ids=cache.lengths[:, None],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        return states[:, -1]

    def _noise(self, index: int) -> np.ndarray:
        request = self.requests[index]
        return uniforms(self.seed, request.prompt_id, request.sample_index, self.tokens.shape[1])

    def _record(self, alive: Tensor, drawn: Tensor, logprobs: Tensor) -> list[int]:
        """Keep the drawn tokens; returns the rows whose completion they end."""
        sampling, position = self.sampling, self.counts[alive]
        self.tokens[alive, position], self.logprobs[alive, position] = drawn, logprobs
        self.counts[alive] += 1
        stopped = torch.isin(drawn, self.engine._ends.cpu())
        if sampling.stop:
            stopped |= torch.tensor([self._meets_stop(i) for i in alive.tolist()])
        ended = stopped | (self.counts[alive] == self.limits[alive])
        rows: list[int] = ended.nonzero()[:, 0].tolist()
        for row in rows:
            self.reasons[int(alive[row])] = "stop" if stopped[row] else "length"
        if rows and self.progress:
            self.progress.advance(len(rows))
        return rows

    def _meets_stop(self, index: int) -> bool:
        """Whether the newest token completes a stop string; it may span tokens."""
        count, first = int(self.counts[index]), self.sampling.min_new_tokens
        if count <= first:
            return False
        window = STOP_WINDOW + max(len(text) for text in self.sampling.stop)
        start = max(0, count - window)
        decode, tokens = self.engine.tokenizer.decode, self.tokens[index]
        known = len(decode(tokens[start:first].tolist())) if start < first else 0
        return (
            cut_at_stop(decode(tokens[start:count].tolist()), self.sampling.stop, known) is not None
        )

    def _completion(self, index: int) -> Sampled:
        count = int(self.counts[index])
        ids, logprobs = (values[index, :count].tolist() for values in (self.tokens, self.logprobs))
        return finish(self.engine.tokenizer, ids, logprobs, self.reasons[index], self.sampling)


def _check_attention(
    model: PreTrainedModel, requests: Sequence[Request], sampling: Sampling
) -> None:
    """InputError where a layer keeps anything else than the states of all tokens."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    longest = max((len(r.prompt_ids) + max_new_tokens(r, sampling) for r in requests), default=0)
    if kinds == {"sliding_attention"} and longest <= config.sliding_window:
        return
    if kinds:
        raise InputError(
            f"{config.model_type}: layers of {', '.join(sorted(kinds))} are not supported by the "
            f"transformers engine at {longest} tokens; use rollout.engine vllm"
        )


def _end_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> set[int]:
    configured = model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return {token for token in (*ends, tokenizer.eos_token_id) if token is not None}
