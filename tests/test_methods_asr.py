"""ASR: where a completion is cut, which tokens stay, and what those that go are missing from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from entrograd.methods.advantage import asr
from entrograd.methods.batch import Batch, denominators
from entrograd.methods.diagnostics import diagnostics
from entrograd.methods.params import MethodParams
from entrograd.methods.registry import recipe
from entrograd.models.forward import completion_logprobs
from entrograd.numerics.segments import change_segments
from entrograd.params import check
from entrograd.train.optimizer import Optimizer
from entrograd.train.params import Optimizer as OptimizerParams
from entrograd.train.policy import Policy
from entrograd.train.step import train_step
from golden.make import SETTINGS, batch, choose, float64_model
from helpers.method_batches import assert_rows, group, pad


def scored(rewards: list[float], scores: list[list[float]], **columns: Any) -> Batch:
    """One group with token scores."""
    built = group(rewards, entropies=scores, **columns)
    return replace(built, token_scores=pad(scores))


def chosen(loss: str = "grpo", kl_coefficient: float = 0.0, **block: Any) -> Any:
    block = {"source": "reward_model", "segmentation": "token", "epsilon": 0.0, **block}
    blocks = {"asr": block, loss: {"kl_coefficient": kl_coefficient}}
    return recipe(check(MethodParams, {"name": "asr", "loss": loss, **blocks}, "method"))


class TestCuts:
    """Scores .10, .15, .12 about the baseline .12 and .13."""

    mask = torch.ones(1, 3).bool()

    def test_a_change_of_sign_below_delta(self) -> None:
        # about .12: -, +, 0, each step far below delta
        scores = torch.tensor([[0.10, 0.15, 0.12]], dtype=torch.float64)
        assert change_segments(scores, self.mask, 0.5, 0.12, 1).tolist() == [[0, 1, 2]]
        # about 0 nothing changes side
        assert change_segments(scores, self.mask, 0.5, 0.0, 1).tolist() == [[0, 0, 0]]

    def test_beta_scales_what_delta_is_held_against(self) -> None:
        # log-ratios .1, .25, .25 (all positive): a step of .15, of .075 at beta .5; delta .1
        rows = [[-1.0, -1.0, -1.0]]
        one = group([1], old_logprobs=rows, ref_logprobs=[[-1.1, -1.25, -1.25]])
        for beta, cuts in ((0.5, [[0, 0, 0]]), (1.0, [[0, 1, 1]])):
            estimator = asr.Asr(beta=beta, delta=0.1, min_length=1)
            assert estimator.segments(one).tolist() == cuts
            assert estimator.token_scores(one)[0].tolist() == pytest.approx(
                [0.1 * beta, 0.25 * beta, 0.25 * beta]
            )

    def test_no_segment_at_the_end_is_short(self) -> None:
        # a jump before the fourth of five would leave two
        scores = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]])
        mask = torch.ones(1, 5).bool()
        assert change_segments(scores, mask, 0.5, -1.0, 3).tolist() == [[0] * 5]
        assert change_segments(scores, mask, 0.5, -1.0, 2).tolist() == [[0, 0, 0, 1, 1]]


class TestKept:
    def test_sides_of_a_baseline(self) -> None:
        # about .5: -, +, 0; the token at the baseline belongs to neither side
        scores, mask = torch.tensor([[0.4, 0.6, 0.5]] * 2), torch.ones(2, 3).bool()
        advantages = torch.tensor([[1.0], [-1.0]])
        found = asr.kept_tokens(scores, advantages, mask, 0.5)
        assert found.long().tolist() == [[0, 1, 0], [1, 0, 0]]

    def test_the_baseline_of_a_run(self) -> None:
        built = scored([1, 0], [[0.4, 0.6, 0.5], [0.4, 0.6, 0.5]])
        kept = chosen(baseline=0.5).advantages(built) != 0
        assert kept.long().tolist() == [[0, 1, 0], [1, 0, 0]]

    def test_advantages_do_not_grow(self) -> None:
        built = scored([1, 0], [[1, -1, -1, -1], [-1]])
        a = 0.7071068
        for keep in (False, True):
            found = chosen(keep_denominator=keep).advantages(built)
            assert_rows(found, built, [[a, 0, 0, 0], [-a]], 1e-7)


def total(recipe: Any, built: Batch, now: Tensor | None = None, longest: int = 10) -> float:
    """The loss of a whole batch."""
    mask = recipe.loss_mask(built)
    loss = recipe.policy_loss(
        built.old_logprobs if now is None else now, recipe.advantages(built), built
    )
    return float(recipe.aggregate(loss, mask, denominators(built, longest, mask)))


class TestDenominator:
    """Rewards (1, 0): A = +-.7071068, a; ratio 1. Right: one of four tokens stays; wrong: its one.

    The second group of scores keeps two of four and the one.
    """

    one = scored([1, 0], [[1, -1, -1, -1], [-1]])
    two = scored([1, 0], [[1, 1, -1, -1], [-1]])
    a = 0.7071067811865476

    @pytest.mark.parametrize(
        ("loss", "first", "second"),
        [
            # (-a/1 + a/1) / 2 completions; (-2a/2 + a) / 2
            ("grpo", 0.0, 0.0),
            # (-a + a) / 2 tokens kept; (-2a + a) / 3
            ("dapo", 0.0, -a / 3),
            # L stays: (-a + a) / (2 * 10); (-2a + a) / 20
            ("dr_grpo", 0.0, -a / 20),
        ],
    )
    def test_masked_tokens_leave_it(self, loss: str, first: float, second: float) -> None:
        assert total(chosen(loss), self.one) == pytest.approx(first, abs=1e-12)
        assert total(chosen(loss), self.two) == pytest.approx(second, abs=1e-12)

    @pytest.mark.parametrize(
        ("loss", "first"),
        [
            # (-a/4 + a) / 2; (-a + a) / 5; (-a + a) / 20
            ("grpo", 0.375 * a),
            ("dapo", 0.0),
            ("dr_grpo", 0.0),
        ],
    )
    def test_or_stay_in_it(self, loss: str, first: float) -> None:
        assert total(chosen(loss, keep_denominator=True), self.one) == pytest.approx(first)

    def test_a_penalty_leaves_with_its_token(self) -> None:
        # d = log pi_ref - log pi: 0 at tokens kept, ln 2 at masked ones, where k3 is 1 - ln 2
        ref = [[0.0, math.log(2), math.log(2), math.log(2)], [0.0]]
        built = replace(self.one, ref_logprobs=pad(ref))
        kl: dict[str, Any] = {"kl_coefficient": 1.0}
        assert total(chosen(**kl), built) == pytest.approx(0.0, abs=1e-12)
        # with keep_denominator they lose their advantage alone: (3/4) (1 - ln 2) / 2 more
        stays = chosen(keep_denominator=True, **kl)
        expected = 0.375 * self.a + 0.375 * (1 - math.log(2))
        assert total(stays, built) == pytest.approx(expected)

    def test_a_completion_without_an_advantage_stays_whole(self) -> None:
        # equal rewards: no sign to agree with, so penalty and count are those of any method
        built = scored([1, 1], [[1, -1], [-1]])
        built = replace(built, ref_logprobs=pad([[math.log(2)] * 2, [math.log(2)]]))
        assert torch.equal(chosen().loss_mask(built), built.completion_mask)
        assert total(chosen(kl_coefficient=1.0), built) == pytest.approx(1 - math.log(2))

    def test_diagnostics_are_those_of_the_advantage(self) -> None:
        subject = chosen()
        found = diagnostics(subject, self.one, self.one.old_logprobs, subject.advantages(self.one))
        assert found["advantage_correct"] == pytest.approx(self.a / 4)  # one of four tokens
        assert found["kept_tokens"] == 0.4


@pytest.mark.parametrize("budget", [7, 60, 100000])
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_a_step_divides_by_what_the_whole_batch_keeps(
    loss: str, budget: int, tiny_model: Path
) -> None:
    """Oracle: the clipped surrogate over kept tokens, term by term, however the step is split."""
    block = {"source": "reward_model", "segmentation": "token"}
    section = {"name": "asr", "loss": loss, "asr": block}
    subject, built = float64_model(tiny_model), batch(3)
    method = recipe(check(MethodParams, section, "method"))
    flat = completion_logprobs(subject, built.prompt_ids, built.completion_ids, 1.0)[0].detach()
    optimizer = Optimizer(subject, {}, OptimizerParams(lr=1e-3), 1)
    settings = replace(SETTINGS, token_budget=budget)
    found = train_step(Policy(subject, optimizer), method, built, settings)["loss"]
    rows, place = built.batch, 0
    advantages = choose("grpo").advantages(rows)
    per_row, kept_count, silent = [], 0, 0
    for i, length in enumerate(rows.lengths.tolist()):
        terms, a = [], float(advantages[i, 0])
        for t in range(length):
            ratio = math.exp(float(flat[place]) - float(rows.old_logprobs[i, t]))
            place += 1
            if float(rows.token_scores[i, t]) * a > 0:  # type: ignore[index]
                high = 1.28 if loss == "dapo" else 1.2
                terms.append(-min(ratio * a, min(max(ratio, 0.8), high) * a))
            silent += a == 0
        kept_count += len(terms)
        per_row.append(terms)
    sums = sum(map(sum, per_row))
    expected = {
        "grpo": sum(sum(terms) / max(len(terms), 1) for terms in per_row) / len(per_row),
        "dapo": sums / (kept_count + silent),
        "dr_grpo": sums / (len(per_row) * SETTINGS.max_length),
    }[loss]
    assert 0 < kept_count < int(rows.completion_mask.sum()) - silent
    assert found == pytest.approx(expected, rel=1e-9)
