"""Logprobs and entropies from hidden states, and the forward pass with shared prompts."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from entrograd.errors import InputError
from entrograd.models import forward
from entrograd.models.forward import (
    _plain_hidden,
    _shared_hidden,
    batches,
    completion_logprobs,
    length_chunks,
    saved_tokens,
    score,
    shares_prompts,
)
from entrograd.models.load import load_model
from entrograd.models.prefix import common_prefix
from entrograd.numerics.logprobs import logprobs_and_entropies
from helpers.model_families import family


def sequences(seed: int, groups: int = 3, size: int = 3) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of equal prompts that begin alike and differ in length, ragged completions."""
    rng = random.Random(seed)
    prompts = [
        [5, 6, 7, 8, *[rng.randrange(1, 61) for _ in range(rng.randrange(1, 6))]]
        for _ in range(groups)
    ]
    chosen = [prompts[i % groups] for i in range(groups * size)]
    return chosen, [[rng.randrange(1, 61) for _ in range(rng.randrange(1, 8))] for _ in chosen]


class TestLogprobsAndEntropies:
    def reference(self, hidden: Tensor, head: Tensor, targets: Tensor, t: float) -> Any:
        """Plain Python float64: log-softmax and entropy, one token at a time."""
        logprobs, entropies = [], []
        for row, target in zip((hidden @ head.T / t).tolist(), targets.tolist(), strict=True):
            top = max(row)
            total = math.fsum(math.exp(z - top) for z in row)
            p = [math.exp(z - top) / total for z in row]
            logprobs.append(row[target] - top - math.log(total))
            entropies.append(-math.fsum(q * math.log(q) for q in p if q > 0))
        return logprobs, entropies

    @pytest.mark.parametrize(("tokens", "vocabulary"), [(4, 7), (64, 101), (1, 1), (5, 1000)])
    def test_values(self, tokens: int, vocabulary: int) -> None:
        torch.manual_seed(0)
        hidden = torch.randn(23, 16, dtype=torch.float64)
        head = 2 * torch.randn(101, 16, dtype=torch.float64)
        targets = torch.randint(0, 101, (23,))
        got = logprobs_and_entropies(
            hidden, head, targets, 0.7, token_tile=tokens, vocabulary_tile=vocabulary
        )
        want = self.reference(hidden, head, targets, 0.7)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, torch.tensor(b, dtype=torch.float64), rtol=0, atol=1e-11)

    def test_gradient_is_that_of_finite_differences(self) -> None:
        torch.manual_seed(1)
        hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        head = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
        targets = torch.tensor([0, 8, 3, 3, 5])
        assert torch.autograd.gradcheck(
            lambda h, w: logprobs_and_entropies(
                h, w, targets, 1.3, token_tile=2, vocabulary_tile=4
            )[0],
            (hidden, head),
        )

    @pytest.mark.parametrize("shape", ["padded", "whole", "shards"])
    def test_heads_with_padding_rows_or_in_shards(self, shape: str) -> None:
        """A vocabulary rounded up to 128 rows, which no tile divides, softmax over all of them as
        the model's own; the same in uneven parts put together, gradients back in each part."""
        torch.manual_seed(6)
        hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
        rows = torch.randn(128, 8, dtype=torch.float64)
        known = 101  # the tokenizer's words; the rows behind them are padding
        if shape == "padded":
            rows[known:] = 0.0
        parts = list(rows.split([50, 78] if shape == "shards" else [128]))
        leaves = [part.clone().requires_grad_() for part in parts]
        targets = torch.randint(0, known, (23,))
        targets[:4] = torch.tensor([0, 49, 50, known - 1])
        weight = torch.randn(23, dtype=torch.float64)
        head = torch.cat(leaves)
        logprobs, entropies = logprobs_and_entropies(
            hidden, head, targets, 0.7, token_tile=10, vocabulary_tile=37
        )
        found = torch.autograd.grad((logprobs * weight).sum(), [hidden, *leaves])
        logs = (hidden @ torch.cat(leaves).T / 0.7).log_softmax(-1)
        plain = logs.gather(-1, targets[:, None])[:, 0]
        want = torch.autograd.grad((plain * weight).sum(), [hidden, *leaves])
        torch.testing.assert_close(logprobs, plain, rtol=0, atol=1e-11)
        torch.testing.assert_close(entropies, -(logs.exp() * logs).sum(-1), rtol=0, atol=1e-11)
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)

    def test_a_frozen_head_has_no_gradient_and_the_states_have_theirs(self) -> None:
        torch.manual_seed(4)
        hidden, head = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
        targets = torch.tensor([0, 8, 3, 3, 5])
        logprobs_and_entropies(hidden, head, targets, vocabulary_tile=4)[0].sum().backward()
        alone = hidden.detach().clone().requires_grad_()
        frozen = head.detach()
        logprobs_and_entropies(alone, frozen, targets, vocabulary_tile=4)[0].sum().backward()
        assert frozen.grad is None
        assert head.grad is not None
        assert alone.grad is not None
        assert hidden.grad is not None
        assert torch.equal(alone.grad, hidden.grad)

    def test_float32_is_exact_to_1e_5(self) -> None:
        torch.manual_seed(2)
        hidden, head = torch.randn(64, 32), torch.randn(5000, 32) / 4
        targets = torch.randint(0, 5000, (64,))
        got, entropy = logprobs_and_entropies(hidden, head, targets, vocabulary_tile=512)
        logs = torch.log_softmax(hidden.double() @ head.double().T, -1)
        plain = logs.gather(-1, targets[:, None])[:, 0]
        torch.testing.assert_close(got.double(), plain, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            entropy.double(), -(logs.exp() * logs).sum(-1), rtol=0, atol=1e-5
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_peak_extra_memory_is_two_tiles(self, dtype: torch.dtype) -> None:
        """Allocations as torch's profiler records them; full logits would be 16 tiles."""
        torch.manual_seed(5)
        hidden = torch.randn(1024, 32, dtype=dtype, requires_grad=True)
        head = torch.randn(2048, 32, dtype=dtype, requires_grad=True)
        targets = torch.randint(0, 2048, (1024,))
        tile, vectors = 256 * 512 * 4, 16 * 1024 * 4
        results = 2 * 4 * (hidden.numel() + head.numel())  # the gradients, and in float32 before

        def forward_pass() -> Tensor:
            return logprobs_and_entropies(
                hidden, head, targets, token_tile=256, vocabulary_tile=512
            )[0]

        forward_pass().sum().backward()  # what is allocated once
        hidden.grad = head.grad = None
        logprobs, extra = self.peak(forward_pass)
        assert tile < extra <= 2 * tile + vectors
        _, extra = self.peak(logprobs.sum().backward)
        assert tile < extra <= 2 * tile + results + vectors

    @staticmethod
    def peak(call: Any) -> tuple[Any, int]:
        """What `call` returns, and the most bytes it held at a time beyond those before it."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            result = call()
        recorded = profile.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]"]
        assert changes
        held = [sum(size for _, size in sorted(changes)[: i + 1]) for i in range(len(changes))]
        return result, max(held)

    def test_nothing_flows_back_through_entropies(self) -> None:
        hidden = torch.randn(3, 4, requires_grad=True)
        _, entropies = logprobs_and_entropies(hidden, torch.randn(6, 4), torch.tensor([0, 1, 2]))
        assert not entropies.requires_grad

    def test_certain_and_uniform_distributions(self) -> None:
        # logits (0,...,0): H = ln 8, log p = -ln 8; logits (1000, 0, ...): H = 0, log p = 0
        hidden = torch.tensor([[0.0], [1000.0]], dtype=torch.float64)
        head = torch.tensor([[1.0], *[[0.0]] * 7], dtype=torch.float64)
        logprobs, entropies = logprobs_and_entropies(hidden, head, torch.tensor([0, 0]))
        assert logprobs.tolist() == pytest.approx([-math.log(8), 0.0], abs=1e-12)
        assert entropies.tolist() == pytest.approx([math.log(8), 0.0], abs=1e-12)


class TestSharedPrompts:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("name", ["llama", "qwen", "gemma"])
    def test_equal_to_the_plain_forward(self, name: str, attention: str) -> None:
        model = family(name, attention)
        prompts, completions = sequences(7)
        results = []
        for hidden in (_shared_hidden, _plain_hidden):
            model.zero_grad()
            states = hidden(model, prompts, completions)
            states.square().sum().backward()
            gradient = torch.cat(
                [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            )
            results.append((states.detach(), gradient))
        (shared, shared_gradient), (plain, plain_gradient) = results
        assert shared.shape == (sum(map(len, completions)), 32)
        torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)
        scale = plain_gradient.abs().max()
        torch.testing.assert_close(
            shared_gradient / scale, plain_gradient / scale, rtol=0, atol=1e-5
        )

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("name", ["llama", "qwen", "gemma"])
    def test_recomputed_layers_give_the_same_gradient(self, name: str, attention: str) -> None:
        model = family(name, attention)
        prompts, completions = sequences(9)
        results = []
        for recomputed in (False, True):
            if recomputed:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            logprobs, entropies = completion_logprobs(model, prompts, completions, 0.9)
            logprobs.square().sum().backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            results.append((logprobs.detach(), entropies, gradient / gradient.abs().max()))
        for got, want in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert not any(module.training for module in model.modules())
        with torch.no_grad():  # and decoding with a cache still works
            shared, _ = completion_logprobs(model, prompts, completions, 0.9, True)
        torch.testing.assert_close(shared, results[0][0], rtol=1e-5, atol=1e-5)

    def test_recomputed_layers_keep_less(self) -> None:
        """Bytes that the graph holds, counted as autograd saves them."""
        model = family("llama", "sdpa")
        prompts, completions = sequences(9, groups=4, size=4)

        def kept() -> int:
            sizes: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                completion_logprobs(model, prompts, completions, 1.0, False)
            weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
            return sum(size for place, size in sizes.items() if place not in weights)

        before = kept()
        model.gradient_checkpointing_enable()
        assert kept() < before / 2

    def test_the_choice_counts_tokens_and_can_be_made(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # a group of 3: plain 3 rows of 4 + 3 - 1; shared 4 once, then 3 rows of 2
        prompts, completions = [[1, 2, 3, 4]] * 3, [[5, 6, 7]] * 3
        assert saved_tokens(prompts, completions) == 3 * 6 - (4 + 3 * 2)
        # one row has nothing to share
        assert saved_tokens(prompts[:1], completions[:1]) == 0
        # two prompts that begin alike: 3 tokens once, then 1 each; plain repeats them
        assert saved_tokens([[1, 2, 3, 4], [1, 2, 3, 5]], [[6], [7]]) == 2 * 4 - (3 + 2)
        used: list[str] = []

        def watched(name: str, whole: Any) -> Any:
            def call(*arguments: Any) -> Any:
                used.append(name)
                return whole(*arguments)

            return call

        for name in ("_shared_hidden", "_plain_hidden"):
            monkeypatch.setattr(forward, name, watched(name, getattr(forward, name)))
        model = family("llama", "sdpa")
        completion_logprobs(model, prompts, completions, 1.0)
        completion_logprobs(model, prompts[:1], completions[:1], 1.0)
        completion_logprobs(model, prompts, completions, 1.0, False)
        completion_logprobs(model, prompts[:1], completions[:1], 1.0, True)
        assert used == ["_shared_hidden", "_plain_hidden", "_plain_hidden", "_shared_hidden"]

    def test_one_token_prompts_and_completions(self) -> None:
        model = family("llama", "sdpa")
        prompts, completions = [[5], [5], [9]], [[1], [2], [3]]
        torch.testing.assert_close(
            _shared_hidden(model, prompts, completions), _plain_hidden(model, prompts, completions)
        )

    def test_score_keeps_order_and_does_not_depend_on_the_budget(self) -> None:
        model = family("llama", "sdpa")
        prompts, completions = sequences(11, groups=4, size=4)
        with torch.no_grad():
            flat, _ = completion_logprobs(model, prompts, completions, 0.8)
        want = [part.tolist() for part in flat.split([len(c) for c in completions])]
        for budget in (1, 40, 100000):
            got = score(model, prompts, completions, 0.8, budget)
            for (logprobs, entropies), expected in zip(got, want, strict=True):
                assert logprobs == pytest.approx(expected, abs=1e-5)
                assert len(entropies) == len(expected)
                assert all(0 <= h <= math.log(61) + 1e-6 for h in entropies)

    def test_sliding_windows_are_not_shared(self, tiny_model: Path) -> None:
        model = load_model(tiny_model, "float32", "cpu")
        assert shares_prompts(model)
        model.config.layer_types = ["full_attention", "sliding_attention"]
        assert not shares_prompts(model)

    def test_soft_capped_heads_are_refused(self, tiny_model: Path) -> None:
        model = load_model(tiny_model, "float32", "cpu")
        model.config.final_logit_softcapping = 30.0
        with pytest.raises(InputError, match="soft-capped"):
            completion_logprobs(model, [[5]], [[6]], 1.0)


class TestBatches:
    def test_every_row_once_and_within_budget(self) -> None:
        prompts, completions = sequences(5, groups=6, size=5)
        planned = list(batches(prompts, completions, 60))
        assert sorted(row for rows in planned for row in rows) == list(range(30))
        for rows in planned:
            unique = {tuple(prompts[i]) for i in rows}
            cost = len(unique) * max(map(len, unique))
            cost += len(rows) * max(len(completions[i]) for i in rows)
            assert cost <= 60 or len(rows) == 1

    def test_similar_lengths_together_and_nothing_twice(self) -> None:
        lengths = [0, 5, 1, 4, 3, 1, 5, 2, 0, 100]
        chunks = length_chunks(lengths)
        assert [sorted(lengths[i] for i in chunk) for chunk in chunks] == [
            [100], [4, 5, 5], [3], [2], [1, 1],
        ]  # fmt: skip
        assert len(length_chunks(list(range(5000)))) < 35

    def test_common_prefix_leaves_one_token(self) -> None:
        assert common_prefix([[1, 2, 3], [1, 2, 4, 5]]) == 2
        assert common_prefix([[1, 2], [1, 2, 3]]) == 1
        assert common_prefix([[1], [1]]) == 0
        assert common_prefix([[4, 2], [1, 2]]) == 0
