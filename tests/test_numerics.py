"""Numerics: masked statistics, group statistics, ratios, KL, aggregation, semantic entropy."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from entrograd.methods.batch import Denominators
from entrograd.numerics import aggregate, groups, kl, masked, surrogate
from entrograd.numerics.semantic_entropy import cluster_shares, semantic_entropy


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


NAN = float("nan")


class TestMasked:
    values = tensor([1.0, 2.0, NAN], [4.0, NAN, NAN], [NAN, NAN, NAN])
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])

    def test_sums_and_means_ignore_padding(self) -> None:
        assert masked.sums(self.values, self.mask).tolist() == [3.0, 4.0, 0.0]
        assert masked.means(self.values, self.mask).tolist() == [1.5, 4.0, 0.0]

    @pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.8, 1.0])
    def test_quantile_is_numpys(self, q: float) -> None:
        found = float(masked.quantile(self.values, self.mask, q))
        assert found == pytest.approx(np.quantile([1.0, 2.0, 4.0], q))

    def test_quantile_of_nothing_is_not_a_number(self) -> None:
        assert math.isnan(masked.quantile(self.values[2:], self.mask[2:], 0.5))


class TestGroups:
    """Groups {0: (1, 1, 0, 0), 1: (3), 2: (2, 5)} interleaved."""

    index = torch.tensor([0, 2, 0, 1, 0, 2, 0])
    values = tensor(1, 2, 1, 3, 0, 5, 0)

    def test_totals_and_sizes(self) -> None:
        assert groups.totals(self.values, self.index).tolist() == [2, 7, 2, 3, 2, 7, 2]
        assert groups.sizes(self.index).tolist() == [4, 2, 4, 1, 4, 2, 4]

    def test_centered(self) -> None:
        expected = [0.5, -1.5, 0.5, 0.0, -0.5, 1.5, -0.5]
        assert groups.centered(self.values, self.index).tolist() == expected

    def test_zscore_sample(self) -> None:
        # (1,1,0,0): s = sqrt(4 * .25 / 3) = .5773503, .5 / s = .8660254; (2,5): 1.5 / 2.1213203
        scores = groups.zscore(self.values, self.index, 0.0, sample=True)
        expected = tensor(0.8660254, -0.7071068, 0.8660254, 0, -0.8660254, 0.7071068, -0.8660254)
        assert torch.allclose(scores, expected, atol=1e-7, rtol=0)

    def test_zscore_population(self) -> None:
        scores = groups.zscore(self.values, self.index, 0.0, sample=False)
        assert scores.tolist() == [1.0, -1.0, 1.0, 0.0, -1.0, 1.0, -1.0]

    def test_zscore_against_the_statistics_module(self) -> None:
        values = [0.3, 0.1, 0.25, 0.9]
        mean, std = statistics.mean(values), statistics.stdev(values)
        scores = groups.zscore(tensor(*values), torch.zeros(4).long(), 1e-4, sample=True)
        assert scores.tolist() == pytest.approx([(v - mean) / (std + 1e-4) for v in values])

    def test_equal_values_give_exactly_zero_whatever_the_rounding(self) -> None:
        # 0.1 + 0.1 + 0.1 is not 3 * 0.1 in binary
        index = torch.zeros(3).long()
        for scores in (
            groups.centered(tensor(0.1, 0.1, 0.1), index),
            groups.zscore(tensor(0.1, 0.1, 0.1), index, 0.0, sample=True),
        ):
            assert scores.tolist() == [0.0, 0.0, 0.0]

    def test_a_deviation_that_is_rounding_is_zero(self) -> None:
        index = torch.zeros(3).long()
        # (.1 + .2 + .3) / 3 is not .2 in binary
        assert groups.centered(tensor(0.1, 0.2, 0.3), index).tolist()[1] == 0.0
        # up to 1e-12 of the largest value, and of float32's precision where values have no more
        assert groups.all_equal(tensor(1.0, 1.0 + 1e-13, 1.0), index).all()
        assert not groups.all_equal(tensor(1.0, 1.0 + 1e-11, 1.0), index).any()
        assert groups.centered(tensor(0.1, 0.2, 0.3).float(), index).tolist()[1] == 0.0
        assert not groups.all_equal(tensor(1.0, 1.0 + 1e-6, 1.0).float(), index).any()
        # the scale is the group's own
        pairs = tensor(1e6, 1e6, 1e-8, 2e-8)
        found = groups.all_equal(pairs, torch.tensor([0, 0, 1, 1]))
        assert found.tolist() == [True, True, False, False]

    def test_token_zscore_of_equal_tokens_is_zero_without_epsilon(self) -> None:
        # .1 + 1 over three tokens; a deviation of 2e-16 must not be divided by itself
        mask = torch.ones(3, 1).bool()
        scores = groups.token_zscore(
            tensor([1.1], [1.1], [1.1]), mask, torch.zeros(3).long(), torch.tensor([3] * 3), 0.0
        )
        assert scores.tolist() == [[0.0]] * 3

    def test_token_zscore_with_zeros_in_the_population(self) -> None:
        # tokens 1, 3 and two zeros: mean 1, var (0 + 4 + 1 + 1) / 4 = 1.5
        mask = torch.tensor([[True, True]])
        scores = groups.token_zscore(
            tensor([1.0, 3.0]), mask, torch.tensor([0]), torch.tensor([4]), 0.0
        )
        assert torch.allclose(scores, tensor([0.0, 2 / math.sqrt(1.5)]))


class TestKl:
    """log pi = -1, log pi_ref = -1.5: d = -.5."""

    now, ref = tensor(-1.0), tensor(-1.5)

    def test_k1(self) -> None:
        assert kl.k1(self.now, self.ref).item() == 0.5

    def test_k2(self) -> None:
        assert kl.k2(self.now, self.ref).item() == 0.125

    def test_k3(self) -> None:
        # exp(-.5) + .5 - 1 = .1065307
        assert kl.k3(self.now, self.ref).item() == pytest.approx(0.1065307, abs=1e-7)

    def test_estimators_average_to_the_divergence(self) -> None:
        # exact expectation under pi over three outcomes
        pi, ref = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
        exact = sum(p * math.log(p / r) for p, r in zip(pi.tolist(), ref.tolist(), strict=True))
        for name in ("k1", "k3"):
            estimates = kl.estimate(name, pi.log(), ref.log())
            assert float((pi * estimates).sum()) == pytest.approx(exact)

    def test_only_k2_as_a_loss_has_the_gradient_of_the_divergence(self) -> None:
        logits = torch.tensor([0.1, -0.4, 0.6], dtype=torch.float64, requires_grad=True)
        ref = tensor(0.2, 0.2, 0.6).log()

        def gradient(loss: Tensor) -> list[float]:
            return torch.autograd.grad(loss, logits, retain_graph=True)[0].tolist()

        logs = logits.log_softmax(0)
        weight = logs.exp().detach()
        exact = gradient((logs.exp() * (logs - ref)).sum())
        assert gradient((weight * kl.k2(logs, ref)).sum()) == pytest.approx(exact)
        assert gradient((weight * kl.k3(logs, ref)).sum()) != pytest.approx(exact)
        assert gradient((weight * kl.k1(logs, ref)).sum()) == pytest.approx([0, 0, 0], abs=1e-12)


class TestSurrogate:
    one = torch.tensor([[True]])

    @pytest.mark.parametrize(
        ("advantage", "ratio", "objective"),
        [(1, 1.5, 1.28), (-1, 1.5, -1.5), (1, 0.5, 0.5), (-1, 0.5, -0.8)],
    )
    def test_clip(self, advantage: float, ratio: float, objective: float) -> None:
        loss = surrogate.clipped(tensor([ratio]), tensor([advantage]), 0.2, 0.28)
        assert loss.item() == pytest.approx(-objective)

    def test_sequence_ratios(self) -> None:
        # log-ratios (.1, -.2, .3): mean of exp 1.0912535; exp of mean 1.0689391
        mask = torch.tensor([[True, True, True, False]])
        logs = tensor([0.1, -0.2, 0.3, NAN])
        old = tensor([0.0, 0.0, 0.0, NAN])
        arithmetic = surrogate.arithmetic_ratio(logs, old, mask)[0, :3]
        geometric = surrogate.geometric_ratio(logs, old, mask)[0, :3]
        assert arithmetic.tolist() == pytest.approx([1.0912535] * 3, abs=1e-7)
        assert geometric.tolist() == pytest.approx([1.0689391] * 3, abs=1e-7)

    def test_weighted_likelihood(self) -> None:
        # ratio e^.5 = 1.6487 clipped to 1.28: -1.28 * 2 * log pi
        loss = surrogate.weighted_likelihood(
            tensor([-0.5]), tensor([-1.0]), tensor([2.0]), self.one, 0.28
        )
        assert loss.item() == pytest.approx(1.28)

    def test_huge_log_ratios_stay_finite(self) -> None:
        now = torch.tensor([[500.0, -500.0]], requires_grad=True)
        mask = torch.tensor([[True, True]])
        loss = surrogate.clipped(
            surrogate.token_ratio(now, torch.zeros(1, 2), mask), torch.ones(1, 2), 0.2, 0.2
        )
        loss.sum().backward()
        assert torch.isfinite(loss).all()
        assert now.grad is not None
        assert torch.isfinite(now.grad).all()

    # exp of (.5, 1, -1) = 1.6487, 2.7183, .3679; their product e^.5
    @pytest.mark.parametrize(
        ("kind", "level", "expected"),
        [
            ("truncated", "token", [1.6487213, 2.0, 0.3678794]),
            ("masked", "token", [1.6487213, 0.0, 0.3678794]),
            ("truncated", "sequence", [1.6487213] * 3),
            ("masked", "sequence", [1.6487213] * 3),
        ],
    )
    def test_correction_weight(self, kind: str, level: str, expected: list[float]) -> None:
        weight = surrogate.importance_weight(
            tensor([0.5, 1.0, -1.0, NAN]),
            tensor([0.0, 0.0, 0.0, NAN]),
            torch.tensor([[True, True, True, False]]),
            kind=kind,  # type: ignore[arg-type]
            level=level,  # type: ignore[arg-type]
            cap=2.0,
        )
        assert weight[0].tolist() == pytest.approx([*expected, 1.0], abs=1e-7)


class TestAggregate:
    """Losses (1, 2, 3) and (5): two completions of 3 and 1 tokens, longest allowed 4."""

    loss = tensor([1.0, 2.0, 3.0], [5.0, NAN, NAN])
    mask = torch.tensor([[True] * 3, [True, False, False]])
    counts = Denominators(tokens=4, completions=2, max_length=4)

    def test_token_mean(self) -> None:
        assert aggregate.token_mean(self.loss, self.mask, self.counts) == 11 / 4

    def test_sequence_mean(self) -> None:
        assert aggregate.sequence_mean(self.loss, self.mask, self.counts) == (2 + 5) / 2

    def test_constant_length(self) -> None:
        assert aggregate.constant_length(self.loss, self.mask, self.counts) == 11 / 8


class TestSemanticEntropy:
    def entropy(self, ids: list[int], estimator: str, ell: list[float] | None = None) -> float:
        index = torch.zeros(len(ids)).long()
        values = semantic_entropy(
            tensor(*(ell or [0.0] * len(ids))),
            index,
            torch.tensor(ids),
            estimator,  # type: ignore[arg-type]
        )
        assert len(set(values.tolist())) == 1
        return values[0].item()

    @pytest.mark.parametrize(
        ("ids", "expected"),
        [
            ([0, 1, 2, 1], 1.0397208),
            ([0, 0, 0, 0, 0, 3], 0.4505612),
            (list(range(8)), 2.0794415),
            ([7] * 5, 0.0),
        ],
    )
    def test_discrete(self, ids: list[int], expected: float) -> None:
        assert self.entropy(ids, "discrete") == pytest.approx(expected, abs=1e-7)

    def test_likelihood_weighted(self) -> None:
        ids, ell = [0, 0, 1, 2], [-0.1, -0.2, -0.3, -0.4]
        assert self.entropy(ids, "rao", ell) == pytest.approx(0.9996414, abs=1e-7)
        assert self.entropy(ids, "paper", ell) == pytest.approx(1.1944033, abs=1e-7)

    def test_the_papers_estimator_grows_as_mass_concentrates(self) -> None:
        ell = [math.log(p) for p in (0.97, 0.01, 0.01, 0.01)]
        assert self.entropy([0, 1, 2, 3], "rao", ell) == pytest.approx(0.1677, abs=5e-5)
        assert self.entropy([0, 1, 2, 3], "paper", ell) == pytest.approx(3.4615, abs=5e-5)
        assert self.entropy([0, 1, 2, 3], "paper", ell) > math.log(4)

    def test_very_unlikely_completions_keep_their_proportions(self) -> None:
        ids, ell = [0, 0, 1, 2], [-900.1, -900.2, -900.3, -900.4]
        assert self.entropy(ids, "rao", ell) == pytest.approx(0.9996414, abs=1e-7)

    def test_groups_do_not_share_clusters(self) -> None:
        index, ids = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 0, 1])
        values = semantic_entropy(torch.zeros(4), index, ids, "discrete")
        assert values.tolist() == pytest.approx([0.0, math.log(2), 0.0, math.log(2)])

    def test_cluster_shares(self) -> None:
        shares = cluster_shares(torch.ones(5), torch.zeros(5).long(), torch.tensor([0, 0, 0, 1, 2]))
        assert shares.tolist() == pytest.approx([0.6, 0.6, 0.6, 0.2, 0.2])
