"""Drawing tokens, the transformers engine, and stage rollout with its shards."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrograd.errors import InputError
from entrograd.models.forward import score
from entrograd.models.load import load_model, load_tokenizer, policy_version
from entrograd.rollout.engine import EngineError, Request, Sampled
from entrograd.rollout.engines import known_context
from entrograd.rollout.params import RolloutParams, Sampling, VllmParams
from entrograd.rollout.rollout import rollout, training_prompts
from entrograd.rollout.sampler import draw, filter_logits, uniforms
from entrograd.rollout.transformers_engine import TransformersEngine
from entrograd.storage.hashing import sha256
from entrograd.storage.tables import provenance, read_table, shard_name, write_table
from helpers.paths import ROOT
from helpers.tables import prompts_table


def requests(count: int, samples: int = 2, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    prompts = [
        (6, 7, 4, *[rng.randrange(3, 80) for _ in range(rng.randrange(1, 6))]) for _ in range(count)
    ]
    return [Request(f"p{i}", s, prompts[i]) for i in range(count) for s in range(samples)]


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model, SmolLM2-135M-Instruct: models/base, or where that is absent made anew."""
    made = ROOT / "models/base"
    if (made / "config.json").exists():
        return made
    out = tmp_path_factory.mktemp("base") / "model"
    words = [sys.executable, "stages/base_model.py", "--out", str(out), "--timings", ""]
    subprocess.run([*words, "--work", str(out.parent / "work")], cwd=ROOT, check=True)
    return out


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine(
        load_model(tiny_model, "float32", "cpu"), load_tokenizer(tiny_model), 4096
    )


class TestUniforms:
    def test_a_function_of_its_arguments_alone(self) -> None:
        first = uniforms(3, "a", 1, 8)
        assert first.tolist() == uniforms(3, "a", 1, 8).tolist()
        assert first.tolist() == uniforms(3, "a", 1, 20)[:8].tolist()
        others = [uniforms(4, "a", 1, 8), uniforms(3, "b", 1, 8), uniforms(3, "a", 2, 8)]
        assert all(first.tolist() != other.tolist() for other in others)
        assert ((first >= 0) & (first < 1)).all()

    def test_neighbouring_keys_do_not_correlate(self) -> None:
        values = torch.tensor([uniforms(0, "p", i, 1)[0] for i in range(4000)])
        assert abs(values.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / 4000**0.5
        assert abs(torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1]) < 0.07


class TestDraw:
    def test_inverse_of_the_cumulative_distribution(self) -> None:
        # p = (1/2, 1/4, 1/4): u in [0, .5) -> 0, [.5, .75) -> 1, [.75, 1) -> 2
        logits = torch.tensor([math.log(2.0), 0.0, 0.0]).expand(6, 3)
        uniform = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 0.999999], dtype=torch.float64)
        tokens, logprobs = draw(logits, uniform, Sampling())
        assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
        want = [math.log(0.5)] * 2 + [math.log(0.25)] * 4
        assert logprobs.tolist() == pytest.approx(want, abs=1e-6)

    def test_temperature_and_greedy(self) -> None:
        logits = torch.tensor([[0.0, 1.0, 3.0]])
        _, logprob = draw(
            logits, torch.tensor([0.999], dtype=torch.float64), Sampling(temperature=2.0)
        )
        top = math.exp(1.5) / (1 + math.exp(0.5) + math.exp(1.5))
        assert logprob.item() == pytest.approx(math.log(top), abs=1e-6)
        tokens, logprobs = draw(logits, torch.zeros(1).double(), Sampling(temperature=0.0))
        assert (tokens.item(), logprobs.item()) == (2, 0.0)

    @settings(max_examples=50, deadline=None, derandomize=True)
    @given(
        st.lists(st.floats(-20, 20), min_size=1, max_size=12),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 4),
        st.floats(0.05, 1),
    )
    def test_only_tokens_that_survive_the_filters(
        self, row: list[float], u: float, top_k: int, top_p: float
    ) -> None:
        """Oracle in plain Python: the allowed set and the renormalised log-probability."""
        sampling = Sampling(top_k=top_k, top_p=top_p)
        tokens, logprobs = draw(torch.tensor([row]), torch.tensor([u]).double(), sampling)
        kept = filter_logits(torch.tensor([row]), sampling)[0].isfinite().tolist()
        assert kept[tokens.tolist()[0]]
        mass = math.fsum(math.exp(z) for z, k in zip(row, kept, strict=True) if k)
        want = row[tokens.tolist()[0]] - math.log(mass)
        assert logprobs.item() == pytest.approx(want, abs=1e-4)

    def test_filters_equal_those_of_transformers(self) -> None:
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        torch.manual_seed(0)
        logits, ids = 3 * torch.randn(20, 50), torch.zeros(20, 1, dtype=torch.long)
        ours = filter_logits(logits, Sampling(top_k=7, top_p=0.8))
        theirs = TopPLogitsWarper(0.8)(ids, TopKLogitsWarper(7)(ids, logits))
        assert torch.equal(ours.isfinite(), theirs.isfinite())


class TestEngine:
    def test_greedy_equals_generate(self, engine: TransformersEngine) -> None:
        asked = requests(5, 1)
        got = engine.generate(asked, Sampling(temperature=0.0, max_new_tokens=12), 0)
        model: Any = engine.model
        for request, completion in zip(asked, got, strict=True):
            ids = torch.tensor([request.prompt_ids])
            want = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
            )
            assert list(completion.completion_ids) == want[0, ids.shape[1] :].tolist()

    def test_greedy_equals_generate_on_the_default_model(self, base_model: Path) -> None:
        """Token for token in float32; prompts of several lengths in one batch."""
        model, tokenizer = load_model(base_model, "float32", "cpu"), load_tokenizer(base_model)
        texts = [
            "The capital of France is",
            "7 + 5 = 12\n9 - 4 =",
            "def fibonacci(n):\n",
            "Once upon a time there was a fox who",
        ]
        asked = [Request(text, 0, tuple(tokenizer.encode(text))) for text in texts]
        drawn = TransformersEngine(model, tokenizer, 4096).generate(
            asked, Sampling(temperature=0.0, max_new_tokens=32), 0
        )
        for request, completion in zip(asked, drawn, strict=True):
            ids = torch.tensor([request.prompt_ids])
            want = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False
            )
            assert list(completion.completion_ids) == want[0, ids.shape[1] :].tolist()

    def test_order_batch_and_subset_do_not_change_what_is_drawn(self, tiny_model: Path) -> None:
        model, tokenizer = load_model(tiny_model, "float32", "cpu"), load_tokenizer(tiny_model)
        asked, sampling = requests(6, 3), Sampling(max_new_tokens=10)

        def drawn(chosen: list[Request], budget: int) -> dict[tuple[str, int], tuple[int, ...]]:
            got = TransformersEngine(model, tokenizer, budget).generate(chosen, sampling, 5)
            return {
                (r.prompt_id, r.sample_index): c.completion_ids
                for r, c in zip(chosen, got, strict=True)
            }

        whole = drawn(asked, 4096)
        assert drawn(asked[::-1], 4096) == whole
        assert drawn(asked, 1) == whole
        part = drawn(asked[4:9], 60)
        assert part == {key: whole[key] for key in part}
        assert len({c for (p, _), c in whole.items() if p == "p0"}) > 1  # samples do differ

    def test_logprobs_are_the_models_own(self, engine: TransformersEngine) -> None:
        asked = requests(4, 2)
        got = engine.generate(asked, Sampling(temperature=0.7, max_new_tokens=9), 2)
        again = score(
            engine.model,
            [r.prompt_ids for r in asked],
            [c.completion_ids for c in got],
            0.7,
            1000,
        )
        for completion, (logprobs, _) in zip(got, again, strict=True):
            assert list(completion.sampling_logprobs) == pytest.approx(logprobs, abs=1e-4)

    def test_rows_that_end_at_once_leave_the_others_their_states(
        self, engine: TransformersEngine
    ) -> None:
        """Before the first step, too: many rows end at their first token, others take their place,
        and new prompts, longer ones among them, enter."""
        asked = requests(8, samples=4)
        most = engine.tokenizer.decode(list(range(3, 80)))
        sampling = Sampling(max_new_tokens=4, stop=list(most[::3]))
        drawn = engine.generate(asked, sampling, seed=3)
        assert {len(c.completion_ids) for c in drawn} >= {1, 2, 4}
        scores = score(
            engine.model,
            [r.prompt_ids for r in asked],
            [c.completion_ids for c in drawn],
            1.0,
            4096,
        )
        for completion, (logprobs, _) in zip(drawn, scores, strict=True):
            assert completion.sampling_logprobs == pytest.approx(logprobs, abs=1e-4)

    def test_ends_at_the_end_token(self, tiny_model: Path) -> None:
        model = load_model(tiny_model, "float32", "cpu")
        engine = TransformersEngine(model, load_tokenizer(tiny_model), 4096)
        greedy = Sampling(temperature=0.0, max_new_tokens=8)
        free = engine.generate(requests(1, 1), greedy, 0)[0].completion_ids
        model.generation_config.eos_token_id = [1, free[2]]
        engine = TransformersEngine(model, load_tokenizer(tiny_model), 4096)
        ended = engine.generate(requests(1, 1), greedy, 0)[0]
        count = free.index(free[2]) + 1
        assert ended.completion_ids == free[:count]
        assert ended.finish_reason == "stop"

    def test_a_stop_string_may_span_tokens(self, engine: TransformersEngine) -> None:
        sampling = Sampling(max_new_tokens=30)
        free = next(c for c in engine.generate(requests(8, 2), sampling, 3) if len(c.text) > 6)
        stop = free.text[2:5]
        stopped = [
            c
            for c in engine.generate(
                requests(8, 2), Sampling(max_new_tokens=30, stop=[stop, "never met"]), 3
            )
            if free.text.startswith(c.text) and c.finish_reason == "stop"
        ]
        assert stopped
        assert stopped[0].text == free.text[: free.text.index(stop)]
        assert len(stopped[0].completion_ids) == free.text.index(stop) + len(stop)

    def test_a_stop_string_never_met_ends_at_the_limit(self, engine: TransformersEngine) -> None:
        sampling = Sampling(max_new_tokens=3, stop=["no such text"])
        for completion in engine.generate(requests(3), sampling, 0):
            assert completion.finish_reason == (
                "length"
                if len(completion.completion_ids) == 3 and completion.completion_ids[-1] != 1
                else "stop"
            )
            assert len(completion.sampling_logprobs) == len(completion.completion_ids)

    def test_what_the_context_cannot_hold_is_named(self, engine: TransformersEngine) -> None:
        with pytest.raises(InputError, match=r"prompt long: 250 tokens and 8 new ones .* 256"):
            engine.generate([Request("long", 0, (5,) * 250)], Sampling(max_new_tokens=8), 0)
        with pytest.raises(InputError, match="prompt bare: it has no tokens"):
            engine.generate([Request("bare", 0, ())], Sampling(max_new_tokens=8), 0)

    def test_new_weights_are_taken_and_versioned(self, tiny_model: Path) -> None:
        model = load_model(tiny_model, "float32", "cpu")
        engine = TransformersEngine(model, load_tokenizer(tiny_model), 4096)
        before = engine.policy_version
        engine.update_weights(model)
        assert engine.policy_version == before
        other = load_model(tiny_model, "float32", "cpu")
        with torch.no_grad():
            other.model.norm.weight.mul_(2)
        engine.update_weights(other)
        assert engine.policy_version == policy_version(other) != before
        assert model.model.norm.weight.mean().item() == pytest.approx(2.0)


class TestStage:
    params = RolloutParams(
        group_size=2, shard_prompts=2, sampling=Sampling(max_new_tokens=4), dtype="float32"
    )

    def test_writes_whole_groups_in_shards(self, tiny_model: Path, tmp_path: Path) -> None:
        prompts = prompts_table(tmp_path / "prompts.parquet", 5)
        (tmp_path / "work").mkdir()
        line = rollout(self.params, tiny_model, prompts, tmp_path / "out", tmp_path / "work")
        assert line == "10 completions of 5 prompts in 3 shards"
        rows = read_table(tmp_path / "out", "rollouts").to_pylist()
        assert [(r["prompt_id"], r["sample_index"]) for r in rows] == [
            (f"id{i}", s) for i in range(5) for s in range(2)
        ]
        assert provenance(tmp_path / "out")["sampling"]["max_new_tokens"] == 4
        for row in rows:
            assert len(row["sampling_logprobs"]) == len(row["completion_ids"]) > 0

    def test_continues_at_the_first_missing_shard(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompts = prompts_table(tmp_path / "prompts.parquet", 6)
        for name in ("whole", "broken"):
            (tmp_path / name).mkdir()
        rollout(self.params, tiny_model, prompts, tmp_path / "a", tmp_path / "whole")
        calls: list[int] = []
        real = TransformersEngine.generate

        def generate(self: Any, asked: Any, *rest: Any) -> list[Sampled]:
            calls.append(len(asked))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(self, asked, *rest)

        monkeypatch.setattr(TransformersEngine, "generate", generate)
        with pytest.raises(KeyboardInterrupt):
            rollout(self.params, tiny_model, prompts, tmp_path / "b", tmp_path / "broken")
        assert not (tmp_path / "b").exists()
        kept = (tmp_path / "broken" / "by-2" / shard_name(0)).stat().st_ino
        line = rollout(self.params, tiny_model, prompts, tmp_path / "b", tmp_path / "broken")
        assert "1 shards kept" in line
        assert len(calls) == 4  # one, the interrupted one, the two that were missing
        assert (tmp_path / "b" / shard_name(0)).stat().st_ino == kept
        assert sha256(tmp_path / "a") == sha256(tmp_path / "b")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt_text": "1" * 253}, "prompt id4: 253 tokens and 4 new ones exceed .* of 256"),
            ({"prompt_text": " "}, "prompt id4 is empty"),
        ],
    )
    def test_a_prompt_that_does_not_fit_is_found_before_anything_is_loaded(
        self,
        row: dict[str, Any],
        message: str,
        tiny_model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        path = prompts_table(tmp_path / "p.parquet", 5)
        rows = read_table(path, "prompts").to_pylist()
        write_table(path, [*rows[:4], {**rows[4], **row}], "prompts")
        monkeypatch.setattr("entrograd.rollout.rollout.open_engine", pytest.fail)
        with pytest.raises(InputError, match=rf"p\.parquet: {message}"):
            rollout(self.params, tiny_model, path, tmp_path / "out", tmp_path)
        monkeypatch.undo()
        (tmp_path / "work").mkdir()  # it may stand in the table where it is not drawn
        params = self.params.model_copy(update={"prompts": 4})
        rollout(params, tiny_model, path, tmp_path / "out", tmp_path / "work")

    def test_the_context_is_that_of_the_engine(self, tiny_model: Path) -> None:
        vllm = VllmParams(max_model_len=100)
        known = {
            engine: known_context(RolloutParams(engine=engine, vllm=vllm), tiny_model)
            for engine in ("transformers", "vllm", "vllm_server")
        }
        assert known == {"transformers": 256, "vllm": 100, "vllm_server": 100}
        assert known_context(RolloutParams(engine="vllm"), tiny_model) == 256

    def test_too_few_prompts_are_an_error(self, tmp_path: Path) -> None:
        path = prompts_table(tmp_path / "p.parquet", 3)
        with pytest.raises(InputError, match=r"3 training prompts, 9 asked for"):
            training_prompts(path, 9)
        heldout = prompts_table(tmp_path / "h.parquet", 3, "heldout")
        with pytest.raises(InputError, match="no row of split 'train'"):
            training_prompts(heldout, None)


class TestEngineBatches:
    def test_min_p_equals_transformers(self) -> None:
        from transformers import MinPLogitsWarper

        torch.manual_seed(1)
        logits, ids = 3 * torch.randn(20, 50), torch.zeros(20, 1, dtype=torch.long)
        ours = filter_logits(logits, Sampling(min_p=0.07))
        theirs: Any = MinPLogitsWarper(0.07)
        assert torch.equal(ours.isfinite(), theirs(ids, logits).isfinite())

    def test_the_end_waits_for_min_new_tokens(self, tiny_model: Path) -> None:
        model = load_model(tiny_model, "float32", "cpu")
        model.generation_config.eos_token_id = list(range(1, 70))  # nearly every token ends it
        engine = TransformersEngine(model, load_tokenizer(tiny_model), 4096)
        free = engine.generate(requests(4), Sampling(max_new_tokens=9), 0)
        assert any(len(c.completion_ids) < 3 for c in free)
        for c in engine.generate(requests(4), Sampling(max_new_tokens=9, min_new_tokens=5), 0):
            assert len(c.completion_ids) > 5 or c.finish_reason == "length"
            assert all(token >= 70 or token == 0 for token in c.completion_ids[:5])

    def test_a_stop_string_before_min_new_tokens_does_not_end(
        self, engine: TransformersEngine
    ) -> None:
        stop = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM0123456789")
        sampling = Sampling(max_new_tokens=12, min_new_tokens=6, stop=stop)
        for c in engine.generate(requests(4), sampling, 0):
            assert len(c.completion_ids) > 6
            assert not set(c.text[6:]) & set(stop)
            assert set(c.text[:6]) & set(stop)

    def test_order_gives_the_same_bits_and_any_budget_the_same_tokens(
        self, tiny_model: Path
    ) -> None:
        model, tokenizer = load_model(tiny_model, "float32", "cpu"), load_tokenizer(tiny_model)
        asked = [
            Request(r.prompt_id, r.sample_index, r.prompt_ids, 1 + (3 * i) % 11)
            for i, r in enumerate(requests(7, 3))
        ]
        sampling = Sampling(max_new_tokens=10)
        whole = TransformersEngine(model, tokenizer, 4096).generate(asked, sampling, 1)
        turned = TransformersEngine(model, tokenizer, 4096).generate(asked[::-1], sampling, 1)
        assert turned[::-1] == whole
        for budget in (1, 50, 130):  # rows leave and others enter, one and a few at a time
            got = TransformersEngine(model, tokenizer, budget).generate(asked, sampling, 1)
            assert [c.completion_ids for c in got] == [c.completion_ids for c in whole]
        for request, completion in zip(asked, whole, strict=True):
            assert len(completion.completion_ids) <= min(10, request.max_new_tokens or 10)

    def test_a_prompt_is_computed_once_for_its_group(
        self, engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from entrograd.rollout import transformers_engine as module

        computed: list[tuple[int, ...]] = []
        real = module.compute_prefix

        def compute(model: Any, prompts: Any) -> Any:
            computed.extend(prompts)
            return real(model, prompts)

        monkeypatch.setattr(module, "compute_prefix", compute)
        asked = requests(5, 4)
        engine.generate(asked, Sampling(max_new_tokens=3), 0)
        assert sorted(computed) == sorted({r.prompt_ids for r in asked})

    def test_out_of_memory_goes_on_with_less_then_says_what_to_change(
        self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, tokenizer = load_model(tiny_model, "float32", "cpu"), load_tokenizer(tiny_model)
        sampling = Sampling(max_new_tokens=6)
        want = TransformersEngine(model, tokenizer, 400).generate(requests(6), sampling, 0)
        from entrograd.models.cpu.cache import RowCache

        real, most = RowCache.reserve, [4]

        def reserve(self: RowCache, *arguments: Any) -> None:
            if len(self.lengths) > most[0]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            real(self, *arguments)

        monkeypatch.setattr(RowCache, "reserve", reserve)
        engine = TransformersEngine(model, tokenizer, 400)
        got = engine.generate(requests(6), sampling, 0)
        assert [c.completion_ids for c in got] == [c.completion_ids for c in want]
        assert engine.token_budget < 400
        most[0] = 0
        with pytest.raises(EngineError, match=r"out of memory with 1 completion .*lower"):
            engine.generate(requests(6), sampling, 0)
