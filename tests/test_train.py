"""The optimiser, the step, and both training stages on a tiny model."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from entrograd.data.groups import PromptGroup, table_of
from entrograd.errors import InputError, NonFiniteError
from entrograd.methods.params import MethodParams
from entrograd.methods.registry import recipe
from entrograd.models.load import load_model, load_tokenizer, policy_version
from entrograd.storage.hashing import sha256
from entrograd.storage.tables import read_table, shard_name, write_manifest, write_table
from entrograd.train.batch import examples, micro_batches
from entrograd.train.forward_backward import StepSettings
from entrograd.train.offline import train_offline
from entrograd.train.online import train_online
from entrograd.train.optimizer import Optimizer
from entrograd.train.params import Optimizer as OptimizerParams
from entrograd.train.rounds import PromptOrder, round_seed
from entrograd.train.step import train_step
from entrograd.train.stored_groups import StoredGroups
from helpers.tables import annotated_rows, groups, write_prompts
from helpers.training import online_hashes, pipeline_params, policy

SETTINGS = StepSettings(temperature=1.0, max_length=4, token_budget=1000)


class TestOptimizer:
    def test_schedules_by_hand(self) -> None:
        model = torch.nn.Linear(1, 1)

        def rates(**options: Any) -> list[float]:
            optimizer = Optimizer(model, {}, OptimizerParams(lr=1.0, **options), updates=6)
            seen = []
            for done in range(6):
                optimizer.done = done
                seen.append(optimizer.learning_rate())
            return seen

        assert rates(warmup_updates=2) == [0.5, 1, 1, 1, 1, 1]
        # after two warm-up steps four remain: 1 - 0/4, 1 - 1/4, ...
        assert rates(warmup_updates=2, schedule="linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]
        cosine = rates(schedule="cosine")
        assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)])

    def test_updates_below_the_resolution_of_bfloat16_are_not_lost(self) -> None:
        weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        model = torch.nn.ParameterList([weight])
        masters = {"0": torch.ones(4)}
        params = OptimizerParams(lr=1e-4, max_grad_norm=100.0)
        optimizer = Optimizer(model, masters, params, updates=100)
        for _ in range(100):
            weight.grad = torch.ones(4, dtype=torch.bfloat16)
            optimizer.collect()
            optimizer.step(optimizer.gradient_norm())
        # 100 AdamW steps of 1e-4 against a constant gradient: 1 - 0.01; bf16 steps are 0.0039
        assert optimizer.masters["0"].tolist() == pytest.approx([0.99] * 4, abs=1e-5)
        assert weight.float().tolist() == pytest.approx([0.99] * 4, abs=0.004)
        assert weight.dtype == torch.bfloat16

    def test_micro_batches_are_added_up_and_the_norm_is_bounded(self) -> None:
        weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
        params = OptimizerParams(lr=1.0, max_grad_norm=1.0)
        optimizer = Optimizer(
            torch.nn.ParameterList([weight]), {"0": torch.zeros(2)}, params, updates=1
        )
        for _ in range(2):
            weight.grad = torch.tensor([1.5, 2.0], dtype=torch.bfloat16)
            optimizer.collect()
        assert optimizer.gradient_norm() == pytest.approx(5.0)  # (3, 4)
        seen: list[Any] = []
        optimizer.adamw.register_step_pre_hook(
            lambda *_: seen.append(optimizer.masters["0"].grad.clone())  # type: ignore[union-attr]
        )
        optimizer.step(5.0)
        assert seen[0].tolist() == pytest.approx([0.6, 0.8], abs=1e-5)


class TestPolicy:
    def test_in_bfloat16_is_the_model_read_in_bfloat16(self, tiny_model: Path) -> None:
        """Weights are rounded, rotary frequencies are not: as engines and evaluation have them."""
        subject = policy(tiny_model, "bfloat16").model
        read = load_model(tiny_model, "bfloat16", "cpu")
        for found, want in (
            (subject.named_parameters(), read.named_parameters()),
            (subject.named_buffers(), read.named_buffers()),
        ):
            expected = dict(want)
            assert expected
            for name, tensor in found:
                assert tensor.dtype == expected[name].dtype, name
                assert torch.equal(tensor, expected[name]), name
        ids = torch.tensor([[5, 6, 7, 8, 9] * 20])
        with torch.no_grad():
            assert torch.equal(subject(ids).logits, read(ids).logits)


class TestExamples:
    def test_pads_on_the_right_and_numbers_groups(self) -> None:
        built = examples(groups(annotated_rows()), torch.device("cpu"))
        batch = built.batch
        assert batch.completion_mask.sum(-1).tolist() == [2, 3, 1, 2, 1, 3]
        assert batch.groups.tolist() == [0, 0, 0, 1, 1, 1]
        assert batch.old_logprobs[0].tolist() == pytest.approx([-1.0, -1.1, 0.0])
        assert batch.sampling_logprobs is None
        assert batch.reward_heads is None
        assert batch.names[:4] == ("p0", "p0", "p0", "p1")

    def test_a_column_of_the_wrong_length_is_named(self) -> None:
        rows = annotated_rows()
        rows[1]["entropies"] = [0.5]
        with pytest.raises(InputError, match="rows: row 1: entropies has 1 values for 3"):
            examples(groups(rows), torch.device("cpu"))

    def test_groups_without_signal_leave_before_the_forward(self) -> None:
        built = examples(groups(annotated_rows()), torch.device("cpu"))
        advantages = recipe(MethodParams(name="grpo")).advantages(built.batch)
        rows = torch.cat(micro_batches(built, advantages, 1)).tolist()
        assert sorted(rows) == [0, 1, 2]

    def test_a_reference_calls_for_rows_without_advantages_only_where_the_loss_reads_it(
        self,
    ) -> None:
        rows = [{**row, "ref_logprobs": [-2.0] * len(row["completion_ids"])} 
                for row in annotated_rows()]  # fmt: skip
        built = examples(groups(rows), torch.device("cpu"))
        for section, expected in (
            # old_logprobs are above ref_logprobs everywhere: tokens with positive advantages stay
            ({"name": "asr"}, [0, 2]),
            ({"name": "grpo"}, [0, 1, 2]),
            ({"name": "grpo", "grpo": {"kl_coefficient": 0.1}}, [0, 1, 2, 3, 4, 5]),
            ({"name": "asr", "grpo": {"kl_coefficient": 0.1}}, [0, 1, 2, 3, 4, 5]),
        ):
            chosen = recipe(MethodParams.model_validate(section))
            advantages = chosen.advantages(built.batch)
            parts = micro_batches(built, advantages, 1, None, None, chosen.penalised)
            assert sorted(torch.cat(parts).tolist()) == expected


class TestStep:
    def test_loss_and_gradient_of_grpo_written_out(self, tiny_model: Path) -> None:
        """Oracle: GRPO's objective over full logits, term by term, differentiated by torch."""
        rows = annotated_rows()
        subject = policy(tiny_model, lr=1e-3, max_grad_norm=1e9)
        oracle = load_model(tiny_model, "float32", "cpu")
        total = torch.zeros(())
        # group 0: r = (1, 0, 1), mean 2/3, sample std sqrt((2*(1/3)^2 + (2/3)^2) / 2)
        std = math.sqrt((2 * (1 / 3) ** 2 + (2 / 3) ** 2) / 2)
        for row in rows[:3]:
            advantage = (row["reward"] - 2 / 3) / (std + 1e-4)
            ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
            logs = torch.log_softmax(oracle(ids).logits[0], -1)
            terms = []
            for k, token in enumerate(row["completion_ids"]):
                ratio = torch.exp(logs[2 + k, token] - row["old_logprobs"][k])
                clipped = ratio.clamp(0.8, 1.2)
                terms.append(-torch.minimum(ratio * advantage, clipped * advantage))
            total = total + torch.stack(terms).mean() / 6
        total.backward()
        want = torch.cat([p.grad.flatten() for p in oracle.parameters() if p.grad is not None])
        measured = train_step(
            subject,
            recipe(MethodParams(name="grpo")),
            examples(groups(rows), torch.device("cpu")),
            SETTINGS,
        )
        assert measured["loss"] == pytest.approx(total.item(), rel=1e-4)
        assert measured["grad_norm"] == pytest.approx(want.norm().item(), rel=1e-4)
        torch.optim.AdamW(
            oracle.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
        ).step()
        moved = dict(oracle.named_parameters())
        for name, weight in subject.model.named_parameters():
            torch.testing.assert_close(weight, moved[name], rtol=0, atol=2e-5)

    @pytest.mark.parametrize("name", ["grpo", "seed_grpo", "gtpo", "gspo", "dapo"])
    def test_any_split_into_micro_batches_is_the_same_step(
        self, tiny_model: Path, name: str
    ) -> None:
        rows = annotated_rows()
        rows[3]["reward"] = 1.0
        results = []
        for budget in (1, 20, 1000):
            subject = policy(tiny_model, lr=1e-3)
            measured = train_step(
                subject,
                recipe(MethodParams(name=name)),
                examples(groups(rows), torch.device("cpu")),
                StepSettings(1.0, 4, budget),
            )
            results.append(measured)
        for other in results[1:]:
            assert other["loss"] == pytest.approx(results[0]["loss"], rel=1e-4, abs=1e-7)
            assert other["grad_norm"] == pytest.approx(results[0]["grad_norm"], rel=1e-4)

    def test_no_signal_leaves_the_weights_alone(self, tiny_model: Path) -> None:
        rows = [{**row, "reward": 1.0} for row in annotated_rows()]
        subject = policy(tiny_model, lr=1e-2, weight_decay=0.1)
        before = policy_version(subject.model)
        measured = train_step(
            subject,
            recipe(MethodParams(name="gtpo")),
            examples(groups(rows), torch.device("cpu")),
            SETTINGS,
        )
        assert measured["loss"] == measured["grad_norm"] == 0.0
        assert measured["zero_signal_fraction"] == 1.0
        assert policy_version(subject.model) == before

    def test_a_loss_that_is_no_number_stops_before_the_update(self, tiny_model: Path) -> None:
        subject = policy(tiny_model)
        with torch.no_grad():
            subject.model.lm_head.weight[3, 0] = float("nan")
        kept = {n: p.clone() for n, p in subject.model.named_parameters()}
        with pytest.raises((NonFiniteError, InputError), match="p0"):
            train_step(
                subject,
                recipe(MethodParams(name="grpo")),
                examples(groups(annotated_rows()), torch.device("cpu")),
                SETTINGS,
            )
        for name, weight in subject.model.named_parameters():
            assert torch.equal(weight, kept[name]) or name == "model.embed_tokens.weight"


class TestStoredGroups:
    """A table read as it is due, against the whole of it in memory."""

    def test_any_group_is_that_of_the_whole_table(self, tmp_path: Path) -> None:
        """Groups whose rows lie apart, in shards of odd sizes, beyond one batch of rows."""
        rows = [
            {**row, "prompt_id": f"p{i % 50}", "sample_index": i, "prompt_ids": [5, i % 50]}
            for i, row in enumerate(annotated_rows() * 30)
        ]
        for number, start in enumerate(range(0, len(rows), 67)):
            part = rows[start : start + 67]
            write_table(tmp_path / "t" / shard_name(number), part, "annotated")
        write_manifest(tmp_path / "t")
        parts: list[tuple[int, int]] = []
        stored = StoredGroups(
            tmp_path / "t", tmp_path / "work", lambda t, first: parts.append((first, len(t)))
        )
        assert parts == [(0, 64), (64, 64), (128, 52)]
        assert (len(stored), stored.completions, stored.longest) == (50, 180, 3)
        whole = groups(rows)
        for index in (49, 0, 17, 17):
            assert table_of([stored[index]], "annotated").equals(
                table_of([whole[index]], "annotated")
            )
        stored.add("ref_logprobs", with_reference)
        for index in (3, 48):
            for completion in stored[index].completions:
                want = completion.tokens["old_logprobs"] - 1
                assert np.array_equal(completion.tokens["ref_logprobs"], want)

    def test_two_prompts_of_one_id_are_named(self, tmp_path: Path) -> None:
        rows = annotated_rows()
        rows[4]["prompt_ids"] = [9]
        write_table(tmp_path / "t.parquet", rows, "annotated")
        with pytest.raises(InputError, match=r"t\.parquet: row 4: prompt_ids differ .* prompt p1"):
            StoredGroups(tmp_path / "t.parquet", tmp_path / "work", lambda *_: None)
        assert not list((tmp_path / "work").glob("*"))


def with_reference(built: list[PromptGroup]) -> None:
    for group in built:
        for completion in group.completions:
            completion.tokens["ref_logprobs"] = completion.tokens["old_logprobs"] - 1


class TestOffline:
    def test_equal_runs_give_equal_bytes_and_a_curve(
        self, tiny_model: Path, tmp_path: Path
    ) -> None:
        write_table(
            tmp_path / "a" / shard_name(0),
            annotated_rows(),
            "annotated",
            sampling={"temperature": 1.0, "max_new_tokens": 4},
        )
        write_manifest(tmp_path / "a")
        params = pipeline_params(
            train_offline={"epochs": 3, "prompts_per_update": 1}, method={"name": "gtpo"}
        )
        for name in ("one", "two"):
            line = train_offline(
                params.train_offline,
                params.method,
                tiny_model,
                tmp_path / "a",
                tmp_path / name,
                tmp_path / f"{name}.csv",
                tmp_path / f"work-{name}",
            )
            assert line == "6 updates of gtpo over 2 groups, 3 epochs"
        assert sha256(tmp_path / "one") == sha256(tmp_path / "two")
        assert sha256(tmp_path / "one") != sha256(tiny_model)
        assert load_tokenizer(tmp_path / "one").eos_token_id == 1
        with (tmp_path / "one.csv").open() as file:
            curve = list(csv.DictReader(file))
        assert [row["update"] for row in curve] == ["1", "2", "3", "4", "5", "6"]
        assert {"loss", "grad_norm", "lr", "reward_mean", "entropy_mean"} <= set(curve[0])

    def test_a_column_the_method_needs_is_checked_first(
        self, tiny_model: Path, tmp_path: Path
    ) -> None:
        rows = annotated_rows()
        rows[4]["entropies"] = []
        write_table(tmp_path / "t.parquet", rows, "annotated")
        params = pipeline_params(method={"name": "gtpo"})
        with pytest.raises(InputError, match=r"t.parquet: row 4: entropies is empty .* gtpo"):
            train_offline(
                params.train_offline,
                params.method,
                tiny_model,
                tmp_path / "t.parquet",
                tmp_path / "o",
                tmp_path / "c.csv",
                tmp_path / "work",
            )
        assert not (tmp_path / "o").exists()


class TestOnline:
    def test_prompt_order_is_one_permutation_after_another(self) -> None:
        draws = PromptOrder(7, 3, seed=1)
        seen = [next(draws) for _ in range(7)]
        flat = [index for chosen in seen for index in chosen]
        assert sorted(flat[:7]) == list(range(7))
        assert all(flat.count(i) == 3 for i in range(7))
        assert all(len(set(chosen)) == 3 for chosen in seen)
        assert [next(PromptOrder(2, 5, seed=0))] == [next(PromptOrder(2, 5, seed=0))]
        assert len({round_seed(0, step) for step in range(50)}) == 50

    def test_a_prompt_too_long_is_found_before_the_first_step(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One that these two steps may not even draw; the weights are not loaded."""
        prompts = tmp_path / "prompts.parquet"
        write_prompts(prompts, 8)
        rows = read_table(prompts, "prompts").to_pylist()
        write_table(prompts, [*rows, {**rows[0], "prompt_text": "1" * 255}], "prompts")
        monkeypatch.setattr("entrograd.train.online.Policy", pytest.fail)
        params = pipeline_params(
            rollout={"sampling": {"max_new_tokens": 2}},
            train_online={"rounds": 2, "prompts_per_round": 2},
        )
        with pytest.raises(InputError, match=r"prompts\.parquet: prompt id0: 255 tokens and 2 new"):
            online_hashes(params, tiny_model, tmp_path, "a")

    def test_learns_to_give_the_answer(self, tiny_model: Path, tmp_path: Path) -> None:
        """All answers are 7: within 40 steps a random model says little else."""
        rows = [
            {
                "prompt_id": f"id{i}",
                "source": "s",
                "split": "train",
                "problem": f"{i}",
                "answers": ["7"],
                "prompt_text": f"{i} = ",
            }
            for i in range(8)
        ]
        write_table(tmp_path / "prompts.parquet", rows, "prompts")
        params = pipeline_params(
            rollout={"group_size": 16, "sampling": {"max_new_tokens": 1}},
            train_online={
                "rounds": 40,
                "prompts_per_round": 8,
                "optimizer": {"lr": 0.01},
            },
            method={"name": "grpo"},
        )
        results = []
        for name in ("a", "b"):
            (tmp_path / f"work-{name}").mkdir()
            train_online(
                params,
                tiny_model,
                tmp_path / "prompts.parquet",
                tmp_path / name,
                tmp_path / f"rounds-{name}",
                tmp_path / f"{name}.csv",
                tmp_path / f"work-{name}",
            )
            results.append(
                [sha256(tmp_path / part) for part in (name, f"rounds-{name}", f"{name}.csv")]
            )
        assert results[0] == results[1]
        with (tmp_path / "a.csv").open() as file:
            rewards = [float(row["reward_mean"]) for row in csv.DictReader(file)]
        assert rewards[0] < 0.2
        assert sum(rewards[-5:]) / 5 > 0.8
        rounds = read_table(tmp_path / "rounds-a", "annotated")
        assert rounds.num_rows == 40 * 8 * 16
        versions = rounds.column("policy_version").to_pylist()
        assert versions[0] == policy_version(load_model(tiny_model, "float32", "cpu"))
        assert len(set(versions)) > 10  # a step without signal leaves the weights alone
