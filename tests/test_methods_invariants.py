"""The seven invariants of every preset, in float64, and of every mixture of the four choices."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrograd.errors import InputError
from entrograd.methods.batch import Batch, denominators
from entrograd.methods.components import AdvantageEstimator, RewardComposer
from entrograd.methods.diagnostics import diagnostics
from entrograd.methods.params import MethodParams
from entrograd.methods.presets import CHOICES, COMPONENTS, PRESETS
from entrograd.methods.recipe import Recipe
from entrograd.methods.registry import component, recipe
from entrograd.params import check
from entrograd.storage.columns import BATCH_COLUMNS
from helpers.method_batches import HEADS, make_batch

EVERY = pytest.mark.parametrize("name", list(PRESETS))
MAX_LENGTH = 9


def choose(name: str, **section: Any) -> Recipe:
    return recipe(check(MethodParams, {"name": name, **HEADS, **section}, "method"))


TOKEN_FIELDS = [name for name, column in BATCH_COLUMNS.items() if column.per == "token"]


def current(batch: Batch, seed: int = 7, spread: float = 0.4) -> Tensor:
    """Logprobs near the old ones, requiring gradients, NaN at padding."""
    noise = torch.randn(
        batch.old_logprobs.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return (batch.old_logprobs + spread * noise).requires_grad_()


def full(batch: Batch) -> Batch:
    """`batch` with every completion as long as the longest; numbers where its padding was."""
    draw = torch.Generator().manual_seed(11)
    filled: dict[str, Any] = {}
    for column in TOKEN_FIELDS:
        values = getattr(batch, column)
        fresh = torch.rand(values.shape, generator=draw, dtype=torch.float64)
        sign = -1 if column.endswith("logprobs") else 1
        filled[column] = torch.where(batch.completion_mask, values, sign * fresh)
    return replace(batch, completion_mask=torch.ones_like(batch.completion_mask), **filled)


def loss_and_gradient(
    chosen: Recipe, batch: Batch, logprobs: Tensor, parts: list[list[int]] | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of the whole batch as a sum over micro-batches, and its gradient [B, T]."""
    advantages, counted = chosen.advantages(batch), chosen.loss_mask(batch)
    counts = denominators(batch, MAX_LENGTH, counted)
    losses = []
    for part in parts or [list(range(len(batch.groups)))]:
        rows = torch.tensor(part)
        micro = batch.select(rows)
        token_loss = chosen.policy_loss(logprobs[rows], advantages[rows], micro)
        losses.append(chosen.aggregate(token_loss, counted[rows], counts))
    total = torch.stack(losses).sum()
    return total.detach(), torch.autograd.grad(total, logprobs)[0]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return bool(torch.allclose(a, b, atol=tolerance, rtol=tolerance))


OPTIONS = {
    "kl_coefficient": 0.1,
    "importance_sampling": "truncated",
    "importance_sampling_level": "sequence",
}


@EVERY
class TestInvariants:
    def test_1_padding_never_matters(self, name: str) -> None:
        batch = make_batch(1)
        mask = batch.completion_mask
        garbage: dict[str, Any] = {
            column: torch.where(mask, getattr(batch, column), 1e30) for column in TOKEN_FIELDS
        }
        other = replace(batch, **garbage)
        chosen = choose(name, **{PRESETS[name].loss: OPTIONS})
        now = current(batch)
        loss, gradient = loss_and_gradient(chosen, batch, now)
        filled = torch.where(mask, now.detach(), math.inf).requires_grad_()
        other_loss, other_gradient = loss_and_gradient(chosen, other, filled)
        assert loss == other_loss
        assert torch.equal(gradient, other_gradient)
        assert (gradient[~mask] == 0).all()
        assert (chosen.advantages(batch)[~mask] == 0).all()
        assert gradient.any()

    def test_2_micro_batches_add_up(self, name: str) -> None:
        batch = make_batch(2)
        chosen = choose(name, **{PRESETS[name].loss: OPTIONS})
        now = current(batch)
        whole = loss_and_gradient(chosen, batch, now)
        rows = torch.randperm(13, generator=torch.Generator().manual_seed(0)).tolist()
        for parts in ([[r] for r in rows], [rows[:5], rows[5:6], rows[6:]]):
            split = loss_and_gradient(chosen, batch, now, parts)
            assert close(whole[0], split[0])
            assert close(whole[1], split[1])

    def test_3_nothing_flows_back_through_what_was_measured(self, name: str) -> None:
        batch = make_batch(3)
        grown = {
            column: getattr(batch, column).clone().requires_grad_() for column in BATCH_COLUMNS
        }
        batch = replace(batch, **grown)
        chosen = choose(name)
        advantages = chosen.advantages(batch)
        assert not advantages.requires_grad
        loss = chosen.policy_loss(current(batch), advantages, batch)
        total = chosen.aggregate(loss, batch.completion_mask, denominators(batch, MAX_LENGTH))
        measured = [grown[c] for c in grown if c != "old_logprobs"]
        gradients = torch.autograd.grad(total, measured, allow_unused=True)
        assert all(gradient is None for gradient in gradients)

    @pytest.mark.parametrize("reward", [0.0, 1.0, 0.3])
    def test_4_equal_rewards_give_nothing(self, name: str, reward: float) -> None:
        batch = make_batch(4)
        batch = replace(
            batch,
            rewards=torch.full_like(batch.rewards, reward),
            reward_heads=torch.full((13, 2), 0.1, dtype=torch.float64),
            cluster_ids=torch.zeros(13).long(),
            answered=torch.ones(13).bool(),
        )
        chosen = choose(name)
        assert not chosen.advantages(batch).any()
        loss, gradient = loss_and_gradient(chosen, batch, current(batch))
        assert loss == 0
        assert not gradient.any()

    def test_6_permutation(self, name: str) -> None:
        batch = make_batch(6)
        order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
        chosen, now = choose(name), current(batch)
        shuffled = replace(batch.select(order))
        relabelled = replace(shuffled, groups=3 - shuffled.groups)
        advantages = chosen.advantages(batch)
        assert close(chosen.advantages(shuffled), advantages[order])
        assert close(chosen.advantages(relabelled), advantages[order])
        loss, gradient = loss_and_gradient(chosen, batch, now)
        moved = now.detach()[order].requires_grad_()
        moved_loss, moved_gradient = loss_and_gradient(chosen, relabelled, moved)
        assert close(loss, moved_loss)
        assert close(gradient[order], moved_gradient)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize(
        "column",
        [
            *("old_logprobs", "entropies", "sampling_logprobs", "ref_logprobs", "token_scores"),
            *("rewards", "reward_heads", "logprobs"),
        ],
    )
    def test_7_non_finite_names_the_prompt(self, name: str, column: str, bad: float) -> None:
        batch, row = make_batch(7), 4
        prompt = batch.names[row]
        chosen, now = choose(name), current(batch).detach()
        if column == "logprobs":
            now[row, 0] = bad
        else:
            values = getattr(batch, column).clone()
            values[(row, 0) if values.ndim == 2 else row] = bad
            batch = replace(batch, **{column: values})
            with pytest.raises(InputError, match=f"{prompt}: row {row}.* {column} is"):
                chosen.advantages(batch)
        with pytest.raises(InputError, match=f"{prompt}: row {row}.* {column} is"):
            chosen.policy_loss(now, torch.zeros_like(now), batch)

    def test_gradient_is_that_of_the_loss(self, name: str) -> None:
        """Finite differences, with every kind of ratio: within the clip, and beyond either bound
        with an advantage of either sign. A completion has one advantage and its tokens' ratios lie
        on one side, which makes sequence ratios exact and brings them beyond their bounds too."""
        batch = full(make_batch(8, sizes=(6,), longest=3))
        ratios = torch.tensor([[7.0], [7.5], [0.4], [0.3], [1.0001], [0.9999]]).double()
        ratios = ratios * torch.tensor([1.0, 1.00005, 1.0001], dtype=torch.float64)
        advantages = torch.tensor([[1.0], [-0.5], [0.7], [-1.2], [0.9], [-0.3]]).double()
        advantages = advantages.expand(6, 3)
        chosen = choose(name, **{PRESETS[name].loss: {"kl_coefficient": 0.2}})
        now = (batch.old_logprobs + ratios.log()).requires_grad_()
        mask, counts = batch.completion_mask, denominators(batch, MAX_LENGTH)
        reference = batch.require("ref_logprobs")

        def loss(logprobs: Tensor) -> Tensor:
            if name == "cispo":  # by hand: the weight is a constant, min(rho, 5), of the old point
                weight, d = ratios.clamp(max=5.0), reference - logprobs
                return (-weight * advantages * logprobs + 0.2 * (d.exp() - d - 1)).sum() / 18
            return chosen.aggregate(chosen.policy_loss(logprobs, advantages, batch), mask, counts)

        own = chosen.aggregate(chosen.policy_loss(now, advantages, batch), mask, counts)
        assert abs(float((own - loss(now)).detach())) < 1e-12
        gradient = torch.autograd.grad(own, now)[0]
        found = diagnostics(chosen, batch, now.detach(), advantages)
        if name == "cispo":
            assert found["weight_capped"] == pytest.approx(2 / 6)
        else:  # of six completions one is clipped above, one below: the others' clip has no say
            assert (found["clip_high"], found["clip_low"]) == (pytest.approx(1 / 6),) * 2
        step = 1e-6
        for i, t in mask.nonzero().tolist():
            with torch.no_grad():
                up, down = now.clone(), now.clone()
                up[i, t] += step
                down[i, t] -= step
                slope = (loss(up) - loss(down)) / (2 * step)
            assert float(gradient[i, t]) == pytest.approx(float(slope), abs=1e-7)


class TestInvariant5Reductions:
    """A parameter at its neutral value gives the parent method."""

    batch = make_batch(5)

    def same(self, a: Recipe, b: Recipe, batch: Batch | None = None) -> None:
        batch = batch or self.batch
        now = current(batch)
        for one, other in zip(
            loss_and_gradient(a, batch, now), loss_and_gradient(b, batch, now), strict=True
        ):
            assert close(one, other)
        assert close(a.advantages(batch), b.advantages(batch))

    def test_alpha_0(self) -> None:
        self.same(choose("seed_grpo", seed_grpo={"alpha": 0}), choose("dr_grpo"))

    def test_one_answer(self) -> None:
        batch = replace(self.batch, cluster_ids=torch.zeros(13).long())
        self.same(choose("seed_grpo", seed_grpo={"alpha": 0.9}), choose("dr_grpo"), batch)

    @pytest.mark.parametrize("normalization", ["joint", "with_zeros"])
    def test_a2_0_gives_each_set_one_advantage(self, normalization: str) -> None:
        advantages = choose("gtpo", gtpo={"a2": 0, "normalization": normalization}).advantages(
            self.batch
        )
        rows, columns = self.batch.completion_mask.nonzero().T
        for g, correct in itertools.product(range(4), (False, True)):
            inside = (self.batch.groups == g) & (self.batch.correct == correct)
            values = advantages[rows, columns][inside[rows]]
            assert values.numel() == 0 or close(values, values[:1].expand_as(values), 1e-9)

    def test_a2_0_at_equal_lengths_is_the_standardised_reward(self) -> None:
        # rewards +-1 instead of 1 and 0: the same z-score over the population
        batch = full(self.batch)
        found = choose("gtpo", gtpo={"a2": 0, "normalization": "joint"}).advantages(batch)
        for g in range(4):
            rewards = batch.rewards[batch.groups == g]
            std = rewards.std(unbiased=False)
            expected = (rewards - rewards.mean()) / std if std > 0 else rewards * 0
            assert close(found[batch.groups == g], expected[:, None].expand(-1, 6), 1e-7)

    def test_equal_entropies_are_a2_0(self) -> None:
        flat = replace(self.batch, entropies=torch.full_like(self.batch.old_logprobs, 0.6))
        for name, weight in (("gtpo", "a2"), ("grpo_s", "b2")):
            same = choose(name, **{name: {weight: 0.0}}).advantages(flat)
            assert close(choose(name).advantages(flat), same, 1e-7)

    def test_b2_0_is_the_population_z_score(self) -> None:
        found = choose("grpo_s", grpo_s={"b2": 0}).advantages(self.batch)[:, 0]
        for g in range(4):
            rewards = self.batch.rewards[self.batch.groups == g]
            std = rewards.std(unbiased=False)
            expected = (rewards - rewards.mean()) / std if std > 0 else rewards * 0
            assert close(found[self.batch.groups == g], expected, 1e-7)

    @pytest.mark.parametrize("longest", [1, 5])
    def test_dapo_with_equal_bounds_and_lengths_is_grpo(self, longest: int) -> None:
        batch = full(make_batch(9, longest=longest))
        self.same(choose("dapo", dapo={"clip_high": 0.2}), choose("grpo"), batch)

    def test_dr_grpo_s_loss_at_its_constant_length_is_grpo(self) -> None:
        batch = full(make_batch(9, longest=MAX_LENGTH))
        self.same(choose("grpo", loss="dr_grpo"), choose("grpo"), batch)

    @pytest.mark.parametrize("name", ["gspo", "grpo_s"])
    def test_equal_ratios_within_a_completion_are_its_ratio(self, name: str) -> None:
        batch, bounds = full(make_batch(9, longest=5)), {"clip_low": 0.2, "clip_high": 0.2}
        mixed, plain = choose("grpo", loss=name, **{name: bounds}), choose("grpo")
        ratios = torch.linspace(0.5, 1.6, 13, dtype=torch.float64)[:, None]
        now = (batch.old_logprobs + ratios.log()).requires_grad_()
        for one, other in zip(
            loss_and_gradient(mixed, batch, now), loss_and_gradient(plain, batch, now), strict=True
        ):
            assert close(one, other)

    def test_cispo_without_a_bound_has_the_unclipped_surrogate_s_gradient(self) -> None:
        unclipped = choose("dapo", dapo={"clip_low": 1.0, "clip_high": 1e9})
        uncapped, now = choose("cispo", cispo={"clip_high": 1e9}), current(self.batch)
        gradient = loss_and_gradient(uncapped, self.batch, now)[1]
        assert close(gradient, loss_and_gradient(unclipped, self.batch, now)[1])
        # on policy no bound matters: DAPO's gradient
        now = self.batch.old_logprobs.clone().requires_grad_()
        gradient = loss_and_gradient(choose("cispo"), self.batch, now)[1]
        assert gradient.any()
        assert close(gradient, loss_and_gradient(choose("dapo"), self.batch, now)[1])

    @pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
    @pytest.mark.parametrize("keep", [False, True])
    def test_asr_that_keeps_every_token_is_grpo(self, loss: str, keep: bool) -> None:
        options = {"kl_coefficient": 0.1}
        signs = choose("grpo").advantages(self.batch).sign()
        batch = replace(self.batch, token_scores=signs)
        block = {"source": "reward_model", "keep_denominator": keep}
        self.same(
            choose("asr", loss=loss, **{"asr": block, loss: options}),
            choose("grpo", loss=loss, **{loss: options}),
            batch,
        )

    def test_empo_where_most_are_right_is_grpo(self) -> None:
        # two answers, the right one the larger: n/G and m/G have the z-score of 1 and 0
        batch = make_batch(5, sizes=(3, 5))
        rewards = torch.zeros(8, dtype=torch.float64)
        for g, right in ((0, 2), (1, 3)):
            rewards[(batch.groups == g).nonzero()[:right, 0]] = 1.0
        batch = replace(
            batch, rewards=rewards, cluster_ids=rewards.long(), answered=torch.ones(8).bool()
        )
        self.same(choose("empo", grpo={"epsilon": 0}), choose("grpo", grpo={"epsilon": 0}), batch)

    def test_every_token_kept_is_dapo(self) -> None:
        self.same(
            choose("high_entropy_tokens", high_entropy_tokens={"fraction": 1}), choose("dapo")
        )

    @pytest.mark.parametrize("name", ["gspo", "grpo_s"])
    def test_one_token_sequences_have_token_ratios(self, name: str) -> None:
        batch = make_batch(9, longest=1)
        bounds = {"clip_low": 0.2, "clip_high": 0.2}
        self.same(choose("grpo", loss=name, **{name: bounds}), choose("grpo"), batch)

    def test_infinite_tau_is_the_mean_head(self) -> None:
        even = {"weights": {"format": 0.5, "brevity": 0.5}}
        block = {**HEADS["encore"], "tau": math.inf}
        self.same(choose("encore", encore=block), choose("weighted", weighted=even))

    def test_the_graded_reward_alone_is_grpo(self) -> None:
        self.same(choose("weighted"), choose("grpo"))

    def test_on_policy_correction_is_none(self) -> None:
        batch = replace(self.batch, sampling_logprobs=self.batch.old_logprobs)
        self.same(choose("grpo", grpo={"importance_sampling": "truncated"}), choose("grpo"), batch)

    def test_words_for_nothing(self) -> None:
        self.same(choose("seed_grpo", weighting="none"), choose("dr_grpo"))
        self.same(choose("empo", reward="single"), choose("grpo"))


REWARDS, ADVANTAGES, WEIGHTINGS, LOSSES = (list(COMPONENTS[choice]) for choice in CHOICES)
COMBINATIONS = list(itertools.product(REWARDS, ADVANTAGES, WEIGHTINGS, LOSSES))
LABEL_FREE = {name for name in REWARDS if component(RewardComposer, name).label_free}
BY_CORRECTNESS = {n for n in ADVANTAGES if component(AdvantageEstimator, n).by_correctness}
UNLABELLED = [c for c in COMBINATIONS if c[0] in LABEL_FREE and c[1] in BY_CORRECTNESS]


def test_the_combinations_are_those_of_the_registry() -> None:
    """Those of the components shipped here; a new one joins them."""
    assert {"single", "empo", "encore", "weighted"} <= set(REWARDS)
    assert {"grpo", "dr_grpo", "high_entropy_tokens", "gtpo", "grpo_s", "asr"} <= set(ADVANTAGES)
    assert {"none", "seed_grpo"} <= set(WEIGHTINGS)
    assert {"grpo", "dapo", "dr_grpo", "gspo", "cispo", "grpo_s"} <= set(LOSSES)
    assert {("empo", "gtpo"), ("empo", "grpo_s")} == {c[:2] for c in UNLABELLED}


def mix(combination: tuple[str, str, str, str], **blocks: Any) -> Recipe:
    return choose("grpo", **dict(zip(CHOICES, combination, strict=True)), **blocks)


@pytest.mark.parametrize("combination", UNLABELLED)
def test_unlabelled_rewards_refuse_labelled_advantages(
    combination: tuple[str, str, str, str],
) -> None:
    with pytest.raises(InputError, match=r"method\.advantage: .* no labels"):
        mix(combination)


def hold(chosen: Recipe, batch: Batch, now: Tensor) -> None:
    """Shapes, finite values, detachment, padding, micro-batches, permutation."""
    advantages = chosen.advantages(batch)
    assert advantages.shape == batch.completion_mask.shape
    assert advantages.dtype == batch.rewards.dtype
    assert torch.isfinite(advantages).all()
    assert not advantages.requires_grad
    loss, gradient = loss_and_gradient(chosen, batch, now)
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert (gradient[~batch.completion_mask] == 0).all()
    half = len(batch.groups) // 2
    parts = [list(range(half, len(batch.groups))), *([list(range(half))] if half else [])]
    split_loss, split_gradient = loss_and_gradient(chosen, batch, now, parts)
    size = 1 + gradient.abs().max()
    assert abs(loss - split_loss) <= 1e-10 * (1 + abs(loss))
    assert close(gradient / size, split_gradient / size)
    backwards = torch.arange(len(batch.groups)).flip(0)
    assert close(chosen.advantages(batch.select(backwards)), advantages.flip(0))
    assert all(
        math.isfinite(value)
        for value in diagnostics(chosen, batch, now.detach(), advantages).values()
    )


@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if c not in UNLABELLED])
def test_every_combination_works(combination: tuple[str, str, str, str]) -> None:
    batch = make_batch(COMBINATIONS.index(combination), sizes=(3, 1, 2))
    hold(mix(combination), batch, current(batch))


@st.composite
def ragged_batches(draw: st.DrawFn) -> tuple[Batch, float]:
    """Groups of 1 to 4, lengths 1 to 5; correctness, entropies and log-ratios at their extremes."""
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    batch = make_batch(draw(st.integers(0, 999)), sizes, longest=draw(st.integers(1, 5)))
    correct = draw(st.sampled_from(["mixed", "all correct", "all wrong"]))
    if correct != "mixed":
        value = float(correct == "all correct")
        batch = replace(batch, rewards=torch.full_like(batch.rewards, value))
    entropy = draw(st.sampled_from(["random", "zero", "equal", "some zero"]))
    assert batch.entropies is not None
    if entropy == "some zero":
        batch = replace(batch, entropies=batch.entropies * (batch.entropies > 1))
    elif entropy != "random":
        value = 0.0 if entropy == "zero" else 0.37
        batch = replace(batch, entropies=torch.full_like(batch.old_logprobs, value))
    return batch, draw(st.sampled_from([0.0, 0.3, 50.0, 1e4]))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    drawn=ragged_batches(),
    combination=st.sampled_from([c for c in COMBINATIONS if c not in UNLABELLED]),
    normalization=st.sampled_from(["own_set", "with_zeros", "joint"]),
    estimator=st.sampled_from(["rao", "discrete", "paper"]),
    f=st.sampled_from(["linear", "exponential", "focal", "reciprocal"]),
    asr=st.fixed_dictionaries(
        {
            "source": st.sampled_from(["implicit_reward", "entropy", "reward_model"]),
            "segmentation": st.sampled_from(["change", "token", "entropy_cutoff"]),
            "min_length": st.integers(1, 3),
            "keep_denominator": st.booleans(),
        }
    ),
    options=st.fixed_dictionaries(
        {
            "kl_coefficient": st.sampled_from([0.0, 0.1]),
            "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
            "importance_sampling": st.sampled_from(["none", "truncated", "masked"]),
            "importance_sampling_level": st.sampled_from(["token", "sequence"]),
        }
    ),
)
def test_ragged_groups_at_the_extremes(
    drawn: tuple[Batch, float],
    combination: tuple[str, str, str, str],
    normalization: str,
    estimator: str,
    f: str,
    asr: dict[str, Any],
    options: dict[str, Any],
) -> None:
    batch, spread = drawn
    blocks: dict[str, dict[str, Any]] = {
        "gtpo": {"normalization": normalization},
        "seed_grpo": {"estimator": estimator, "f": f, "alpha": 0.8},
        "asr": asr,
        **HEADS,
    }
    loss = combination[-1]
    chosen = mix(combination, **{**blocks, loss: {**blocks.get(loss, {}), **options}})
    hold(chosen, batch, current(batch, spread=spread))


def test_select_keeps_every_column() -> None:
    batch = make_batch(0)
    part = batch.select(torch.tensor([3, 1]))
    for item in fields(Batch):
        value = getattr(part, item.name)
        if isinstance(value, Tensor):
            assert len(value) == 2, item.name
    assert part.names == (batch.names[3], batch.names[1])
