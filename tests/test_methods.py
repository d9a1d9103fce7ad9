"""Every method's equations, one class each, with the arithmetic in comments."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from entrograd.errors import InputError
from entrograd.methods.advantage import asr
from entrograd.methods.advantage.grpo_s import GrpoS
from entrograd.methods.advantage.gtpo import Gtpo
from entrograd.methods.advantage.high_entropy_tokens import HighEntropyTokens
from entrograd.methods.batch import Batch, denominators
from entrograd.methods.diagnostics import diagnostics
from entrograd.methods.params import MethodParams
from entrograd.methods.registry import recipe
from entrograd.methods.reward.empo import Empo
from entrograd.methods.reward.encore import Encore
from entrograd.methods.reward.single import Single
from entrograd.methods.semantic_entropy import group_entropy
from entrograd.methods.weighting.seed_grpo import SeedGrpo
from entrograd.numerics.overlong import overlong_penalty
from entrograd.numerics.ratings import composed, rating_entropy, weights
from entrograd.numerics.segments import change_segments, entropy_segments, segment_means
from entrograd.params import check
from entrograd.report.curves import FIGURES
from helpers.method_batches import assert_rows, group, ragged


def choose(name: str, **section: Any) -> Any:
    return recipe(check(MethodParams, {"name": name, **section}, "method"))


class TestGrpoAdvantage:
    def test_sample_standard_deviation_and_epsilon(self) -> None:
        # (1,1,0,0): mean .5, s = sqrt(4 * .25 / 3) = .5773503; .5 / (.5773503 + .0001) = .8658754
        batch = group([1, 1, 0, 0])
        assert_rows(
            choose("grpo").advantages(batch), batch, [[0.8658754]] * 2 + [[-0.8658754]] * 2, 1e-7
        )
        exact = choose("grpo", grpo={"epsilon": 0.0}).advantages(batch)
        assert_rows(exact, batch, [[0.8660254]] * 2 + [[-0.8660254]] * 2, 1e-7)

    @pytest.mark.parametrize("rewards", [[1.0], [1, 1, 1], [0, 0], [0.1, 0.1, 0.1]])
    def test_no_signal(self, rewards: list[float]) -> None:
        assert not choose("grpo").advantages(group(rewards)).any()


class TestGrpoLoss:
    """Eq. 3 with rewards (1, 0), one token each, ratio 1.5 and 1.5; A = +-.7070068."""

    batch = group([1, 0], old_logprobs=[[-1.0], [-1.0]], ref_logprobs=[[-1.0], [-0.5]])
    now = torch.full((2, 1), -1.0 + math.log(1.5), dtype=torch.float64)

    def loss(self, name: str, **section: Any) -> float:
        chosen = choose(name, **section)
        mask, counts = self.batch.completion_mask, denominators(self.batch, max_length=4)
        losses = chosen.policy_loss(self.now, chosen.advantages(self.batch), self.batch)
        return float(chosen.aggregate(losses, mask, counts))

    def test_clip(self) -> None:
        # -(1.2 * .7070068 - 1.5 * .7070068) / 2
        assert self.loss("grpo") == pytest.approx(0.3 * 0.7070068 / 2, abs=1e-7)

    def test_penalty(self) -> None:
        # d = -1 - (-1 + ln 1.5) = -.4054651: 1/1.5 + .4054651 - 1 = .0721318
        # d = -.5 + 1 - .4054651 = .0945349: e^d - d - 1 = .0046127
        plain, penalised = self.loss("grpo"), self.loss("grpo", grpo={"kl_coefficient": 0.5})
        assert penalised - plain == pytest.approx(0.5 * (0.0721318 + 0.0046127) / 2, abs=1e-6)

    def test_dapo_clips_higher(self) -> None:
        assert self.loss("dapo") == pytest.approx(0.22 * 0.7070068 / 2, abs=1e-7)

    def test_dr_grpo_divides_by_the_constant_length(self) -> None:
        # A = +-.5; (1.5 - 1.2) * .5 / (2 completions * 4)
        assert self.loss("dr_grpo") == pytest.approx(0.3 * 0.5 / 8)

    def test_gspo(self) -> None:
        # one token: s = rho = 1.5, clipped to 1.0004 above, not below
        assert self.loss("gspo") == pytest.approx((1.5 - 1.0004) * 0.7070068 / 2, abs=1e-7)

    def test_cispo(self) -> None:
        # -1.5 A log pi, equal and opposite; with clip_high .2 the same weight 1.2
        assert self.loss("cispo") == pytest.approx(0.0, abs=1e-12)

    def test_reference_is_required_by_the_penalty(self) -> None:
        chosen = choose("grpo", grpo={"kl_coefficient": 0.1})
        assert "ref_logprobs" in chosen.required_columns
        batch = group([1, 0])
        with pytest.raises(InputError, match="ref_logprobs"):
            chosen.policy_loss(torch.zeros(2, 1), torch.zeros(2, 1), batch)


class TestOverlongPenalty:
    @pytest.mark.parametrize(
        ("length", "penalty"),
        [(1, 0), (16384, 0), (18432, -0.5), (20480, -1), (20481, -1), (30000, -1)],
    )
    def test_values(self, length: int, penalty: float) -> None:
        assert overlong_penalty(torch.tensor([length]), 20480, 4096).item() == penalty

    def test_joins_the_reward(self) -> None:
        # lengths 4 and 3 with Lmax 4, Lc 2: penalties -1 and -.5
        batch = group([1, 1], entropies=[[1, 1, 1, 1], [1, 1, 1]])
        composer = Single(overlong_length=4, overlong_buffer=2)
        assert composer.rewards(batch).tolist() == [0.0, 0.5]


class TestSeedGrpo:
    batch = group(
        [1, 1, 0, 0], old_logprobs=[[-0.1], [-0.2], [-0.3], [-0.4]], cluster_ids=[0, 0, 1, 2]
    )

    def test_equation_6(self) -> None:
        # SE .9996414; 1 / (1 + .0417 * .9996414 / ln 4) = .9708084; times +-.5
        assert SeedGrpo().weights(self.batch)[0].item() == pytest.approx(0.9708084, abs=1e-7)
        assert_rows(
            choose("seed_grpo").advantages(self.batch),
            self.batch,
            [[0.4854042]] * 2 + [[-0.4854042]] * 2,
            1e-7,
        )

    def test_mean_logprob_is_length_normalised(self) -> None:
        rows = [[-0.1], [-0.1, -0.3], [-0.2, -0.4, -0.3], [-0.4]]
        batch = group([1, 1, 0, 0], old_logprobs=rows, cluster_ids=[0, 0, 1, 2])
        assert group_entropy(batch, "rao")[0].item() == pytest.approx(0.9996414, abs=1e-7)

    # x = .5: 1-.5; e^-.5; (1-.5)^2; 1/1.5. x = 2: 0; e^-2; 0; 1/3
    @pytest.mark.parametrize(
        ("f", "half", "two"),
        [
            ("linear", 0.5, 0.0),
            ("exponential", 0.6065307, 0.1353353),
            ("focal", 0.25, 0.0),
            ("reciprocal", 0.6666667, 0.3333333),
        ],
    )
    def test_decay(self, f: Any, half: float, two: float) -> None:
        x = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
        found = SeedGrpo(f=f).decay(x).tolist()
        assert found == pytest.approx([1.0, half, two], abs=1e-7)

    def test_one_cluster_is_exactly_one(self) -> None:
        batch = group([1, 0, 1], old_logprobs=[[-0.1], [-0.7], [-0.3]], cluster_ids=[4, 4, 4])
        assert SeedGrpo().weights(batch).tolist() == [1.0] * 3

    def test_a_group_of_one_is_exactly_one(self) -> None:
        batch = group([1], old_logprobs=[[-0.1]], cluster_ids=[0])
        assert SeedGrpo(alpha=5.0).weights(batch).tolist() == [1.0]

    def test_default_multiplier_stays_above_0_96(self) -> None:
        batch = group([1, 0], old_logprobs=[[-0.1], [-0.1]], cluster_ids=[0, 1])
        # the largest entropy: 1 / 1.0417 = .9599693
        assert SeedGrpo().weights(batch)[0].item() == pytest.approx(0.9599693)

    @pytest.mark.parametrize("estimator", ["rao", "discrete", "paper"])
    def test_groups_of_any_size_side_by_side(self, estimator: Any) -> None:
        """Oracle: plain loops over each group; ln G is of the completion's own group."""
        groups = [0, 1, 0, 2, 2, 0, 2, 2, 0, 2, 1]  # of 4, 2 and 5
        clusters = [3, 0, 3, 0, 1, 1, 1, 2, 0, 0, 1]
        ell = [-0.1, -0.9, -0.6, -0.2, -1.3, -0.4, -0.8, -0.3, -0.7, -0.5, -2.0]
        batch = group([0] * 11, old_logprobs=[[value] for value in ell], cluster_ids=clusters)
        batch = replace(batch, groups=torch.tensor(groups))
        found = SeedGrpo(alpha=0.7, estimator=estimator).weights(batch)
        for i, own in enumerate(groups):
            members = [k for k, g in enumerate(groups) if g == own]
            weight = {k: 1.0 if estimator == "discrete" else math.exp(ell[k]) for k in members}
            whole = sum(weight.values())
            names = {clusters[k] for k in members}
            shares = [sum(weight[k] for k in members if clusters[k] == c) / whole for c in names]
            entropy = -sum(
                math.log(p) / len(shares) if estimator == "paper" else p * math.log(p)
                for p in shares
            )
            expected = 1 / (1 + 0.7 * entropy / math.log(len(members)))
            assert float(found[i]) == pytest.approx(expected, rel=1e-12)

    def test_counts_need_no_logprobs(self) -> None:
        assert choose("seed_grpo", seed_grpo={"estimator": "discrete"}).required_columns == {
            "cluster_id"
        }
        assert choose("seed_grpo").required_columns == {"cluster_id", "old_logprobs"}


ENTROPIES: list[list[float]] = [[2, 4, 1], [3, 1], [4, 0.5, 3], [0.5, 4]]


class TestGtpoEquation3And5:
    def test_correct_completions(self) -> None:
        # 1 + .1 * 3/4 * 2 = 1.15; 1 + .1 * 1/4 * 2 = 1.05
        batch = group([1, 1], [[3, 1], [1, 3]])
        found = Gtpo().shaped_rewards(batch)
        assert_rows(found, batch, [[1.15, 1.05], [1.05, 1.15]], 1e-12)

    def test_incorrect_completions(self) -> None:
        # 1/4 and 1: -1 - .1 * (.25 / 1.25) * 2 = -1.04; -1 - .1 * (1 / 1.25) * 2 = -1.16
        batch = group([0, 0], [[4, 1], [1, 4]])
        found = Gtpo().shaped_rewards(batch)
        assert_rows(found, batch, [[-1.04, -1.16], [-1.16, -1.04]], 1e-12)

    def test_ragged_group(self) -> None:
        batch = group([1, 1, 0, 0], ENTROPIES)
        expected = [
            [1.08, 1.16, 1.10],
            [1.12, 1.04],
            [-1.022222, -1.177778, -1.1],
            [-1.177778, -1.022222],
        ]
        assert_rows(Gtpo().shaped_rewards(batch), batch, expected, 1e-6)

    def test_a1_plus_a2_of_one_conserves_each_step(self) -> None:
        batch = group([1, 1, 0, 0], ENTROPIES)
        shaped = Gtpo(a1=0.7, a2=0.3).shaped_rewards(batch)
        # running: O+ 2, 2, 1; O- 2, 2, 1
        assert shaped[:2].sum(0).tolist() == pytest.approx([2, 2, 1])
        assert shaped[2:].sum(0).tolist() == pytest.approx([-2, -2, -1])

    def test_reward_enters_as_it_is(self) -> None:
        # .5 + .1 * 2/3 * 2 and 1 + .1 * 1/3 * 2
        batch = group([0.5, 1], [[2], [1]])
        found = Gtpo().shaped_rewards(batch)
        assert_rows(found, batch, [[0.6333333], [1.0666667]], 1e-7)

    def test_zero_entropy_counts_as_1e_8(self) -> None:
        # O-: 1/H = 1e8 and 1: the confident one takes the whole share: -1 - .1 * 2
        batch = group([0, 0], [[0], [1]])
        assert_rows(Gtpo().shaped_rewards(batch), batch, [[-1.2], [-1.0]], 1e-6)
        batch = group([1, 1], [[0], [0]])
        assert_rows(Gtpo().shaped_rewards(batch), batch, [[1.1], [1.1]], 1e-12)

    def test_the_floor_is_1e_8_and_no_more(self) -> None:
        # O-: 1/H = 1e8 and 1e7: shares 20/11 and 2/11
        batch, expected = group([0, 0], [[0], [1e-7]]), [-1 - 2 / 11, -1 - 0.2 / 11]
        found = Gtpo().shaped_rewards(batch)
        assert found[:, 0].tolist() == pytest.approx(expected, abs=1e-9)
        found = GrpoS().shaped_rewards(batch)
        assert found.tolist() == pytest.approx(expected, abs=1e-9)

    def test_clamp(self) -> None:
        # 3 and 1 clamped to [1.5, 2]: 1 + .1 * 2/3.5 * 2 and 1 + .1 * 1.5/3.5 * 2
        batch = group([1, 1], [[3], [1]])
        found = Gtpo(entropy_low=1.5, entropy_high=2.0).shaped_rewards(batch)
        assert_rows(found, batch, [[1.1142857], [1.0857143]], 1e-7)


class TestGtpoEquation6:
    batch = group([1, 1, 0, 0], ENTROPIES)

    @pytest.mark.parametrize(
        ("normalization", "expected"),
        [
            (
                "own_set",
                [[-0.5, 1.5, 0], [0.5, -1.5], [1.11803, -1.11803, 0], [-1.11803, 1.11803]],
            ),
            (
                "with_zeros",
                [
                    [0.96236, 1.10763, 0.99868],
                    [1.03500, 0.88973],
                    [-0.85517, -1.13688, -0.99602],
                    [-1.13688, -0.85517],
                ],
            ),
            (
                "joint",
                [
                    [0.98051, 1.05315, 0.99867],
                    [1.01683, 0.94420],
                    [-0.92806, -1.06929, -0.99867],
                    [-1.06929, -0.92806],
                ],
            ),
        ],
    )
    def test_population(self, normalization: str, expected: list[list[float]]) -> None:
        chosen = choose("gtpo", gtpo={"normalization": normalization})
        assert_rows(chosen.advantages(self.batch), self.batch, expected)

    def test_default_is_with_zeros(self) -> None:
        assert Gtpo().normalization == "with_zeros"

    def test_own_set_cancels_a1_and_a2(self) -> None:
        def advantages(a1: float, a2: float) -> Tensor:
            block = {"normalization": "own_set", "a1": a1, "a2": a2, "epsilon": 0.0}
            return choose("gtpo", gtpo=block).advantages(self.batch)

        assert torch.allclose(advantages(1.0, 0.1), advantages(5.0, 0.7))

    @pytest.mark.parametrize("rewards", [[1, 1, 1, 1], [0, 0, 0, 0], [0.3] * 4, [0, -1, 0, 0]])
    def test_no_signal(self, rewards: list[float]) -> None:
        assert not choose("gtpo").advantages(group(rewards, ENTROPIES)).any()


def correct_and_wrong(right: list[int], wrong: list[int], seed: int, **columns: Any) -> Batch:
    """One group of 0/1 rewards: completions of these lengths, random entropies."""
    lengths = torch.tensor([*right, *wrong])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    drawn = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)).double()
    rewards = [1.0] * len(right) + [0.0] * len(wrong)
    return replace(group(rewards), completion_mask=mask, old_logprobs=0 * drawn, entropies=drawn,
                   **columns)  # fmt: skip


class TestGtpoSigns:
    """Reading with_zeros: which correct tokens come out positive, exactly."""

    estimator = Gtpo()
    bound = 1.0 / 1.1  # a1 / (a1 + a2)

    @pytest.mark.parametrize("wrong", [1, 3, 7, 9, 10, 11, 30, 100])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_rewards_of_0_and_1(self, wrong: int, seed: int) -> None:
        """50 + 50 correct tokens: all positive iff n / N <= 10/11, which 10 wrong ones make."""
        batch = correct_and_wrong([50, 50], [wrong], seed)
        advantages = self.estimator.advantages(batch)
        assert batch.entropies is not None
        entropies = batch.entropies[:2, :50]
        share = 2 * entropies / entropies.sum(0)  # Eq. 3, both running at every step
        portion = 100 / (100 + wrong)
        lowest = (1.1 * portion - 1.0) / 0.1
        assert torch.equal(advantages[:2, :50] > 0, share > lowest)
        assert (lowest <= 0) == (portion <= self.bound + 1e-12) == (wrong >= 10)
        positive = float((advantages[:2, :50] > 0).double().mean())
        assert positive == 1.0 if wrong >= 10 else 0.0 < positive < 1.0

    def test_nine_in_a_hundred_are_negative_beside_seven_wrong_tokens(self) -> None:
        batch = correct_and_wrong([50, 50], [7], 0)
        negative = self.estimator.advantages(batch)[:2, :50] < 0
        assert 0.05 < float(negative.double().mean()) < 0.2

    def test_wrong_tokens_where_they_are_many(self) -> None:
        # the mirror image: 100 wrong, 7 and 10 correct tokens, whatever these earn
        for right, all_negative in ((7, False), (10, True)):
            batch = correct_and_wrong([right], [50, 50], 0)
            for reward in (1.0, 0.3):
                rewards = torch.tensor([reward, 0.0, 0.0], dtype=torch.float64)
                found = self.estimator.advantages(replace(batch, rewards=rewards))[1:, :50]
                assert bool((found < 0).all()) == all_negative

    def test_unequal_rewards(self) -> None:
        # R+ .2 + .1 and 1 + .1, a zero: mean 1.4 / 3 = .46667, var .21556: -.16667 / .46428
        batch = group([0.2, 1, 0], [[1], [1], [1]])
        found = self.estimator.advantages(batch)[:, 0].tolist()
        assert found[0] == pytest.approx(-0.35898, abs=1e-5)
        assert found[1] > 0 > found[2]

    @pytest.mark.parametrize("seed", range(8))
    def test_a_reward_of_at_least_the_mean_is_positive(self, seed: int) -> None:
        """r_i >= (sum_{k in O+} r_k |o_k| + n a2 / a1) / N: such completions have no negative."""
        draw = torch.Generator().manual_seed(seed)
        rewards = torch.rand(6, generator=draw).double()
        rewards[4:] = 0.0
        lengths = torch.randint(1, 9, (6,), generator=draw).tolist()
        batch = correct_and_wrong(lengths[:4], lengths[4:], seed, rewards=rewards)
        advantages, mask = self.estimator.advantages(batch), batch.completion_mask
        n, total = sum(lengths[:4]), sum(lengths)
        earned = sum(r * length for r, length in zip(rewards.tolist(), lengths, strict=True))
        for i in range(4):
            if float(rewards[i]) >= (earned + 0.1 * n) / total:
                assert (advantages[i][mask[i]] > 0).all()


class TestGrpoS:
    batch = group([1, 1, 0, 0], [[3, 1], [1, 1], [0.25, 0.75], [2]])

    def test_equation_9(self) -> None:
        # Hbar O+ 2, 1: 1 + .1 * 2/3 * 2; O- .5, 2 -> 2, .5: -1 - .1 * 2/2.5 * 2
        expected = [1.133333, 1.066667, -1.16, -1.04]
        found = GrpoS().shaped_rewards(self.batch)
        assert found.tolist() == pytest.approx(expected, abs=1e-6)

    def test_advantage(self) -> None:
        expected = [[1.029302] * 2, [0.968754] * 2, [-1.053520] * 2, [-0.944536]]
        assert_rows(choose("grpo_s").advantages(self.batch), self.batch, expected, 1e-6)

    def test_equation_10(self) -> None:
        # log-ratios (.1, -.2, .3): w = 1.0912535 < 1.28; one completion of advantage 2
        chosen = choose("grpo_s")
        batch = group([1], [[1, 1, 1]])
        now = torch.tensor([[0.1, -0.2, 0.3]], dtype=torch.float64)
        loss = chosen.policy_loss(now, torch.full((1, 3), 2.0).double(), batch)
        total = chosen.aggregate(loss, batch.completion_mask, denominators(batch, 3))
        assert float(total) == pytest.approx(-2 * 1.0912535, abs=1e-6)


class TestSequenceRatiosWithTokenCredit:
    @pytest.mark.parametrize("name", ["gspo", "grpo_s"])
    def test_each_token_takes_its_own_share_of_the_gradient(self, name: str) -> None:
        # on policy, one completion of two tokens: d/dlogp_t of -(1/2) sum_t A_t = -A_t / 2
        chosen, batch = choose(name), group([1], [[1, 1]])
        now = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        credit = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
        loss = chosen.policy_loss(now, credit, batch)
        total = chosen.aggregate(loss, batch.completion_mask, denominators(batch, 2))
        assert torch.autograd.grad(total, now)[0].tolist() == [[-0.5, 1.5]]


class TestHighEntropyTokens:
    def test_cut(self) -> None:
        # entropies 1..10: the .8-quantile is 8.2, so 9 and 10 stay
        batch = group([1, 0], [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
        kept = HighEntropyTokens(fraction=0.2).kept_tokens(batch)
        assert kept.tolist() == [[False] * 5, [False, False, False, True, True]]

    def test_denominator_is_all_tokens(self) -> None:
        chosen = choose("high_entropy_tokens")
        batch = group([1, 0], [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
        advantages = chosen.advantages(batch)
        loss = chosen.policy_loss(torch.zeros(2, 5).double(), advantages, batch)
        total = chosen.aggregate(loss, batch.completion_mask, denominators(batch, 5))
        assert float(total) == pytest.approx(2 * 0.7070068 / 10, abs=1e-7)


class TestEmpo:
    def test_shares(self) -> None:
        batch = group([0] * 5, cluster_ids=[0, 0, 0, 1, 2], answered=torch.ones(5).bool())
        shares = Empo().rewards(batch).tolist()
        assert shares == pytest.approx([0.6, 0.6, 0.6, 0.2, 0.2])

    def test_entropy_of_the_example(self) -> None:
        batch = group([0] * 5, cluster_ids=[0, 0, 0, 1, 2])
        assert group_entropy(batch, "discrete")[0].item() == pytest.approx(0.9502705, abs=1e-7)

    def test_empty_answer_earns_nothing(self) -> None:
        answered = torch.tensor([True, True, False])
        batch = group([0] * 3, cluster_ids=[0, 0, 2], answered=answered)
        assert Empo().rewards(batch).tolist() == pytest.approx([2 / 3, 2 / 3, 0])

    def test_needs_to_know_what_was_answered(self) -> None:
        with pytest.raises(InputError, match="answered"):
            choose("empo").advantages(group([0, 0], cluster_ids=[0, 1]))


class TestEncore:
    entropies = torch.tensor([0.0, 0.693147, 1.609438])

    @pytest.mark.parametrize(
        ("tau", "expected"),
        [
            (0.5, [0.775194, 0.193798, 0.031008]),
            (1.0, [0.588235, 0.294118, 0.117647]),
            (2.0, [0.464184, 0.328227, 0.207589]),
            (math.inf, [1 / 3] * 3),
            (1e-6, [1.0, 0.0, 0.0]),
        ],
    )
    def test_weights(self, tau: float, expected: list[float]) -> None:
        assert weights(self.entropies, tau).tolist() == pytest.approx(expected, abs=1e-6)

    def test_entropy_of_ratings(self) -> None:
        # one value 0; two equally often ln 2; five ln 5
        for ratings, expected in (
            ([0.5, 0.5], 0.0),
            ([0.0, 1.0, 0.0, 1.0], 0.693147),
            ([0.0, 0.25, 0.5, 0.75, 1.0], 1.609438),
        ):
            found = rating_entropy(torch.tensor(ratings)).item()
            assert found == pytest.approx(expected, abs=1e-6)

    def test_composed_reward(self) -> None:
        names = ("a", "b", "c")
        composer = Encore(entropies=dict(zip(names, self.entropies.tolist(), strict=True)))
        batch = group([0], reward_heads=[[0.75, 0.5, 1.0]], head_names=names)
        found = composer.rewards(batch).item()
        assert found == pytest.approx(0.7198405, abs=1e-6)

    def test_log_base(self) -> None:
        # in bits H is larger by 1 / ln 2: the same as tau * ln 2
        bits = Encore(entropies={"a": 0.0, "b": 1.0}, log_base=2.0, tau=2.0)
        nats = Encore(entropies={"a": 0.0, "b": 1.0}, tau=2.0 * math.log(2))
        assert bits.head_weights(("a", "b")) == pytest.approx(nats.head_weights(("a", "b")))

    def test_fitted_once_on_the_data_set(self) -> None:
        measured = {"a": math.log(2), "b": 0.0}
        assert choose("encore").fitted(measured).reward.entropies == measured
        given = choose("encore", encore={"entropies": {"a": 0.0, "b": 0.0}})
        assert given.fitted(measured).reward.entropies == {"a": 0, "b": 0}
        assert choose("grpo").fitted(measured) == choose("grpo")

    def test_heads_that_do_not_fit_are_refused_before_any_completion(self) -> None:
        chosen = choose("encore").fitted({"a": 0.1, "b": 0.2})
        chosen.check_heads(("b", "a"))
        with pytest.raises(InputError, match=r"encore\.entropies.*'a', 'b'.*'a', 'c'"):
            chosen.check_heads(("a", "c"))
        weighed = choose("weighted", weighted={"weights": {"a": 1.0}})
        with pytest.raises(InputError, match=r"weighted\.weights\.a: no such reward head"):
            weighed.check_heads(("b",))

    def test_without_heads_there_is_nothing_to_add_up(self) -> None:
        assert composed(torch.zeros(2, 0), []).tolist() == [0.0, 0.0]

    def test_unmeasured_heads_are_an_error(self) -> None:
        batch = group([0, 1], reward_heads=[[0.5], [1.0]], head_names=("a",))
        with pytest.raises(InputError, match=r"encore\.entropies.*'a'"):
            choose("encore").advantages(batch)


class TestEqualRatings:
    @pytest.mark.parametrize("name", ["encore", "weighted"])
    @pytest.mark.parametrize("seed", range(0, 400, 7))
    def test_give_equal_rewards_to_the_bit(self, name: str, seed: int) -> None:
        """Whatever the number of heads, of completions, and the layout of the ratings."""
        draw = torch.Generator().manual_seed(seed)
        count, size = (int(torch.randint(2, high, (1,), generator=draw)) for high in (12, 70))
        ratings = (torch.randint(0, 5, (1, count), generator=draw).double() / 4).expand(size, -1)
        ratings = ratings.contiguous() if seed % 2 else ratings.T.contiguous().T
        names = tuple("abcdefghijkl"[:count])
        drawn = dict(zip(names, torch.rand(count, generator=draw).tolist(), strict=True))
        key = {"encore": "entropies", "weighted": "weights"}[name]
        batch = replace(group([0.0] * size), reward_heads=ratings, head_names=names)
        chosen = choose(name, **{name: {key: drawn}, "grpo": {"epsilon": 0.0}})
        rewards = chosen.rewarded(batch).rewards
        assert (rewards == rewards[0]).all()
        assert not chosen.advantages(batch).any()

    def test_sums_that_differ_in_binary_alone_are_equal(self) -> None:
        # .1 + .2 and .3: without it the z-score would make +-.707 of 5e-17
        batch = group([0, 0], reward_heads=[[1, 1, 0], [0, 0, 1]], head_names=("a", "b", "c"))
        block = {"weights": {"a": 0.1, "b": 0.2, "c": 0.3}}
        exact = choose("weighted", weighted=block, grpo={"epsilon": 0.0})
        assert not exact.advantages(batch).any()
        for advantage in ("dr_grpo", "gtpo", "grpo_s"):
            whole = replace(
                batch, rewards=torch.ones(2).double(), entropies=torch.ones(2, 1).double()
            )
            assert (
                not choose("weighted", advantage=advantage, weighted=block).advantages(whole).any()
            )


class TestWeighted:
    batch = group([1, 0], reward_heads=[[0.5, 0.25], [1.0, 0.0]], head_names=("a", "b"))

    def test_sum(self) -> None:
        # 1 * 1 + 2 * .25 and 0 + 0
        chosen = choose("weighted", weighted={"weights": {"reward": 1.0, "b": 2.0}})
        found = chosen.reward.rewards(self.batch)
        assert found.tolist() == [1.5, 0.0]

    def test_unknown_head(self) -> None:
        with pytest.raises(InputError, match=r"weights\.c: no such reward head.*reward, a, b"):
            choose("weighted", weighted={"weights": {"c": 1}}).advantages(self.batch)


class TestAsr:
    mask = torch.ones(1, 3).bool()

    @pytest.mark.parametrize(
        ("advantage", "scores", "kept"),
        [(1, [0.3, -0.1, 0.2], [1, 0, 1]), (-1, [0.3, -0.1, 0.0], [0, 1, 0])],
    )
    def test_token_masks(self, advantage: float, scores: list[float], kept: list[int]) -> None:
        found = asr.kept_tokens(torch.tensor([scores]), torch.tensor([[advantage]]), self.mask, 0.0)
        assert found.long().tolist() == [kept]

    def test_entropy_cutoff(self) -> None:
        entropies = torch.tensor([[0.1, 2.5, 0.3, 0.2, 3.0, 0.1]])
        found = entropy_segments(entropies, torch.ones(1, 6).bool(), 2.0)
        assert found.tolist() == [[0, 0, 1, 1, 1, 2]]

    def test_change_segments(self) -> None:
        scores = torch.tensor([[0.1, 0.2, 0.9, 0.8, -0.1, -0.2]])
        mask = torch.ones(1, 6).bool()
        # a jump of .7 before the third, a new sign (and a jump) before the fifth
        assert change_segments(scores, mask, 0.5, 0.0, 1).tolist() == [[0, 0, 1, 1, 2, 2]]
        # at least three long: the cut before the third comes too early, the one before the fifth
        # would leave two
        assert change_segments(scores, mask, 0.5, 0.0, 3).tolist() == [[0] * 6]

    def test_segment_means_with_their_masked_rest(self) -> None:
        scores = torch.tensor([[1.0, 3.0, -2.0], [5.0, math.nan, math.nan]])
        mask = torch.tensor([[True] * 3, [True, False, False]])
        found = segment_means(
            torch.where(mask, scores, 0.0), mask, torch.tensor([[0, 0, 1], [0, 0, 0]])
        )
        assert found.tolist() == [[2.0, 2.0, -2.0], [5.0, 0.0, 0.0]]

    def test_masked_tokens_have_no_advantage(self) -> None:
        # v = (ln old - ln ref) beta: signs (+, -, +) for the right one: two of three tokens stay
        batch = group(
            [1, 0],
            old_logprobs=[[-1.0, -2.0, -1.0], [-2.0]],
            ref_logprobs=[[-2.0, -1.0, -2.0], [-1.0]],
        )
        block = {"segmentation": "token"}
        a = 0.7070068
        for keep in (False, True):
            chosen = choose("asr", asr={**block, "keep_denominator": keep})
            assert_rows(chosen.advantages(batch), batch, [[a, 0, a], [-a]], 1e-7)
            # and leave the denominators with their numerator, unless those are kept
            kept = [[True, keep, True], [True]]
            assert ragged(chosen.loss_mask(batch), batch) == kept


class TestDiagnostics:
    def test_signs_and_shares(self) -> None:
        batch = group([1, 1, 0, 0], ENTROPIES)
        for normalization, share in (("own_set", 0.4), ("with_zeros", 1.0), ("joint", 1.0)):
            chosen = choose("gtpo", gtpo={"normalization": normalization})
            found = diagnostics(chosen, batch, batch.old_logprobs, chosen.advantages(batch))
            # own_set: s0 (-, +, 0), s1 (+, -): two of five
            assert found["positive_correct"] == pytest.approx(share)
            assert all(math.isfinite(value) for value in found.values())
            assert found["zero_signal_fraction"] == 0.0

    def test_clip_and_kl(self) -> None:
        # ratio 1.5 up on the right one (clipped), 1.5 up on the wrong one (not)
        batch = group([1, 0], old_logprobs=[[-1.0], [-1.0]])
        now = torch.full((2, 1), -1.0 + math.log(1.5), dtype=torch.float64)
        chosen = choose("grpo")
        found = diagnostics(chosen, batch, now, chosen.advantages(batch))
        assert (found["clip_low"], found["clip_high"]) == (0.0, 0.5)
        # KL(old || now) = E_old[ratio - 1 - log ratio] = .5 - .4054651
        assert found["kl"] == pytest.approx(0.0945349, abs=1e-7)
        assert found["kl_k1"] == pytest.approx(-0.4054651, abs=1e-7)

    def test_cispo_caps_a_weight_and_keeps_the_gradient(self) -> None:
        # ratios e^2 = 7.4 above the bound 5, of either sign, and 1.5 below it
        batch = group([1, 0], old_logprobs=[[-3.0, -1.0], [-3.0, -1.0]])
        now = batch.old_logprobs + torch.tensor([2.0, math.log(1.5)]).double()
        chosen = choose("cispo")
        found = diagnostics(chosen, batch, now, chosen.advantages(batch))
        assert found["weight_capped"] == 0.5
        assert not {"clip_low", "clip_high"} & set(found)
        now.requires_grad_()
        chosen.policy_loss(now, chosen.advantages(batch), batch).sum().backward()
        assert now.grad is not None
        assert (now.grad != 0).all()

    def test_what_a_mask_leaves_counts_groups_it_leaves_nothing(self) -> None:
        # group 0 keeps both completions, group 1 none; group 2 has no signal to keep
        batch = group([1, 0, 1, 0, 1, 1])
        scores = torch.tensor([[1.0], [-1.0], [-1.0], [1.0], [1.0], [1.0]]).double()
        batch = replace(batch, groups=torch.tensor([0, 0, 1, 1, 2, 2]), token_scores=scores)
        chosen = choose("asr", asr={"source": "reward_model", "segmentation": "token"})
        found = diagnostics(chosen, batch, batch.old_logprobs, chosen.advantages(batch))
        assert (found["kept_tokens"], found["nonzero_tokens"]) == (0.5, pytest.approx(1 / 3))
        assert found["positive_correct"] == found["negative_wrong"] == 0.5
        assert found["zero_signal_fraction"] == pytest.approx(2 / 3)
        nothing = replace(batch, token_scores=-scores.abs() * batch.rewards.sub(0.5)[:, None])
        found = diagnostics(chosen, nothing, batch.old_logprobs, chosen.advantages(nothing))
        assert (found["kept_tokens"], found["zero_signal_fraction"]) == (0.0, 1.0)

    def test_a_reward_at_the_mean_has_no_sign(self) -> None:
        # .2 is the mean of .1, .2, .3, but not of their sum in binary
        for dtype in (torch.float64, torch.float32):
            batch = replace(group([0, 0, 0]), rewards=torch.tensor([0.1, 0.2, 0.3], dtype=dtype))
            chosen = choose("grpo")
            advantages = chosen.advantages(batch)
            assert advantages[1].item() == 0.0
            found = diagnostics(chosen, batch, batch.old_logprobs, advantages)
            assert found["nonzero_tokens"] == pytest.approx(2 / 3)

    def test_multipliers_of_two_groups(self) -> None:
        # one answer: 1; two answers equally likely: 1 / (1 + .0417)
        batch = group([1, 0, 1, 0], old_logprobs=[[-0.1]] * 4, cluster_ids=[0, 0, 0, 1])
        batch = replace(batch, groups=torch.tensor([0, 0, 1, 1]))
        chosen = choose("seed_grpo")
        found = diagnostics(chosen, batch, batch.old_logprobs, chosen.advantages(batch))
        assert found["weighting_min"] == pytest.approx(0.9599693, abs=1e-7)
        assert found["weighting_mean"] == pytest.approx((1 + 0.9599693) / 2, abs=1e-7)

    def test_plain_numbers_of_a_step(self) -> None:
        # entropies 1, 2, .. 5 in two groups of two and one; log-ratio -2 on one token
        batch = group([1, 0, 0], [[1, 2], [3], [4, 5]])
        batch = replace(batch, groups=torch.tensor([0, 0, 1]))
        now = batch.old_logprobs.clone()
        now[0, 1] = -2.0
        chosen = choose("grpo")
        found = diagnostics(chosen, batch, now, chosen.advantages(batch))
        assert (found["reward_mean"], found["length_mean"]) == (
            pytest.approx(1 / 3),
            pytest.approx(5 / 3),
        )
        assert found["zero_signal_fraction"] == 0.5  # a mean over groups, not completions
        assert found["log_ratio_max"] == 2.0
        assert found["clip_low"] == 0.0  # the ratio fell, but the advantage is positive
        assert [found[f"entropy_q{q}"] for q in (10, 50, 90)] == pytest.approx([1.4, 3.0, 4.6])
        assert found["advantage_correct"] == pytest.approx(0.7070068, abs=1e-7)
        assert found["advantage_wrong"] == pytest.approx(-0.7070068 / 3, abs=1e-7)

    def test_the_ratio_that_is_clipped_is_the_loss_s_own(self) -> None:
        # token ratios e^.3 and e^-.3: each beyond .2, their geometric mean 1 clipped by nobody
        batch = group([1, 0], old_logprobs=[[-1.0, -1.0], [-1.0, -1.0]])
        now = torch.tensor([[-0.7, -1.3], [-0.7, -1.3]], dtype=torch.float64)
        for name, low, high in (("grpo", 0.25, 0.25), ("gspo", 0.0, 0.0)):
            chosen = choose(name)
            found = diagnostics(chosen, batch, now, chosen.advantages(batch))
            assert (found["clip_low"], found["clip_high"]) == (low, high)

    def test_distance_from_the_reference(self) -> None:
        # d = log pi_ref - log pi = -.5: e^-.5 + .5 - 1
        batch = group([1, 0], old_logprobs=[[-1.0], [-1.0]], ref_logprobs=[[-1.5], [-1.5]])
        chosen = choose("grpo")
        found = diagnostics(chosen, batch, batch.old_logprobs, chosen.advantages(batch))
        assert found["kl_ref"] == pytest.approx(0.1065307, abs=1e-7)
        assert found["kl"] == 0.0

    def test_signs_and_kept_tokens(self) -> None:
        # the sets' own z-scores: O+ (-, +, 0) (+, -), O- (+, -, 0) (-, +)
        batch = group([1, 1, 0, 0], ENTROPIES)
        chosen = choose("gtpo", gtpo={"normalization": "own_set"})
        found = diagnostics(chosen, batch, batch.old_logprobs, chosen.advantages(batch))
        assert found["positive_correct"] == pytest.approx(0.4)
        assert found["negative_wrong"] == pytest.approx(0.4)
        # the mask keeps 1, 0, 1 of the right one and 0, 1, 0 of the wrong one
        rows = [[-1.0, -2.0, -1.0], [-1.0, -2.0, -1.0]]
        reference = [[-2.0, -1.0, -2.0], [-2.0, -1.0, -2.0]]
        batch = group([1, 0], old_logprobs=rows, ref_logprobs=reference)
        chosen = choose("asr", asr={"segmentation": "token"})
        found = diagnostics(chosen, batch, batch.old_logprobs, chosen.advantages(batch))
        assert found["kept_tokens"] == 0.5

    def test_effective_weights_of_the_heads(self) -> None:
        batch = TestWeighted.batch
        chosen = choose("weighted", weighted={"weights": {"reward": 1.0, "b": 2.0}})
        found = diagnostics(chosen, batch, batch.old_logprobs, chosen.advantages(batch))
        weights = [found[f"weight_{name}"] for name in ("reward", "a", "b")]
        assert weights == [1.0, 0.0, 2.0]

    def test_the_report_draws_what_is_measured(self) -> None:
        batch = group(
            [1, 1, 0, 0],
            ENTROPIES,
            old_logprobs=ENTROPIES,
            ref_logprobs=ENTROPIES,
            cluster_ids=[0, 0, 1, 2],
        )
        measured: set[str] = set()
        for loss in ("dapo", "cispo"):
            chosen = choose("gtpo", weighting="seed_grpo", loss=loss)
            advantages = chosen.advantages(batch)
            measured |= set(diagnostics(chosen, batch, batch.old_logprobs, advantages))
        drawn = {column for figure in FIGURES for column in figure.columns}
        assert drawn - measured == {"loss", "grad_norm", "heldout_accuracy"}  # not the batch's

    def test_semantic_entropy_and_multiplier(self) -> None:
        batch, chosen = TestSeedGrpo.batch, choose("seed_grpo")
        found = diagnostics(chosen, batch, batch.old_logprobs, chosen.advantages(batch))
        assert found["semantic_entropy"] == pytest.approx(0.9996414, abs=1e-7)
        assert found["weighting_mean"] == pytest.approx(0.9708084, abs=1e-7)
