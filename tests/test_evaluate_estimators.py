"""Intervals against hand numbers, exact enumeration and the binomial itself."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest

from entrograd.evaluate.estimators import (
    all_alike,
    average_at_n,
    bootstrap_mean,
    paired_difference,
    problem_means,
    wilson,
)


class TestWilson:
    def test_hand_numbers(self) -> None:
        # k = 8, n = 10, z = 1.959964: z^2 = 3.841459
        # centre = (0.8 + 3.841459/20) / (1 + 3.841459/10) = 0.992073 / 1.384146 = 0.716740
        # half = 1.959964 sqrt(0.8*0.2/10 + 3.841459/400) / 1.384146
        #      = 1.959964 * sqrt(0.02560365) / 1.384146 = 1.959964 * 0.160011 / 1.384146 = 0.226576
        interval = wilson(8, 10)
        assert interval.value == 0.8
        assert interval.low == pytest.approx(0.490164, abs=2e-6)
        assert interval.high == pytest.approx(0.943316, abs=2e-6)

    def test_solves_its_defining_equation(self) -> None:
        # Both ends satisfy (k/n - p)^2 = z^2 p (1 - p) / n.
        z = 1.2815515655446004  # 80 %
        interval = wilson(37, 512, confidence=0.8)
        for p in (interval.low, interval.high):
            assert (37 / 512 - p) ** 2 == pytest.approx(z * z * p * (1 - p) / 512, rel=1e-9)

    def test_none_and_all_correct_have_a_width_inside_the_unit_interval(self) -> None:
        # k = 0: high = z^2 / (n + z^2) = 3.841459 / 23.841459 = 0.161125
        assert wilson(0, 20).low == 0.0
        assert wilson(0, 20).high == pytest.approx(0.161125, abs=2e-6)
        assert wilson(20, 20).high == 1.0
        assert wilson(20, 20).low == pytest.approx(1 - 0.161125, abs=2e-6)

    @pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 5), (6, 5)])
    def test_impossible_counts_are_refused(self, correct: int, n: int) -> None:
        with pytest.raises(ValueError, match="correct"):
            wilson(correct, n)


class TestBootstrap:
    def test_agrees_with_all_resamples(self) -> None:
        values = [0.1, 0.35, 0.7, 1.0, 0.0]
        exact = sorted(sum(draw) / 5 for draw in itertools.product(values, repeat=5))
        interval = bootstrap_mean(values, 200_000, seed=3)
        assert interval.value == pytest.approx(0.43)
        assert interval.low == pytest.approx(exact[int(0.025 * len(exact))], abs=0.011)
        assert interval.high == pytest.approx(exact[int(0.975 * len(exact))], abs=0.011)

    def test_width_is_that_of_the_standard_error(self) -> None:
        values = [float((7 * i) % 10 < 4) for i in range(1000)]
        error = statistics.pstdev(values) / math.sqrt(1000)
        interval = bootstrap_mean(values, 20_000)
        assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.03)

    def test_is_a_function_of_its_arguments(self) -> None:
        values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.5, 0.25]
        assert bootstrap_mean(values, 500, seed=5) == bootstrap_mean(values, 500, seed=5)
        assert bootstrap_mean(values, 501, seed=5) != bootstrap_mean(values, 501, seed=6)

    def test_equal_values_have_no_width(self) -> None:
        interval = bootstrap_mean([0.5] * 4, 100)
        assert (interval.value, interval.low, interval.high) == (0.5, 0.5, 0.5)

    def test_no_problem_is_refused(self) -> None:
        with pytest.raises(ValueError, match="at least one problem"):
            bootstrap_mean([], 100)


class TestPairedDifference:
    def test_hand_numbers(self) -> None:
        # second - first = 1, 0, 0, 1, -1 -> mean 1/5
        interval = paired_difference([0, 1, 0, 0, 1], [1, 1, 0, 1, 0], 2000)
        assert interval.value == pytest.approx(0.2)
        assert interval.low < 0.2 < interval.high

    def test_pairing_removes_what_both_share(self) -> None:
        first = [float(i % 2) * 0.5 for i in range(40)]
        second = [value + 0.25 for value in first]  # always 0.25 better: nothing is uncertain
        interval = paired_difference(first, second, 500)
        assert (interval.low, interval.high) == (pytest.approx(0.25), pytest.approx(0.25))

    def test_equal_differences_are_told_from_others_whatever_their_rounding(self) -> None:
        assert all_alike([0.0] * 16, [1.0] * 16)
        assert all_alike([0.1, 0.2], [0.3, 0.4])  # 0.3 - 0.1 and 0.4 - 0.2 differ in the last bit
        assert not all_alike([0.0] * 16, [1.0] * 15 + [0.0])

    def test_changing_sides_changes_the_sign(self) -> None:
        first, second = [0, 1, 0, 0, 1, 1, 0, 1], [1, 1, 0, 1, 0, 1, 1, 1]
        there, back = paired_difference(first, second, 999), paired_difference(second, first, 999)
        assert (back.value, back.low, back.high) == pytest.approx(
            (-there.value, -there.high, -there.low)
        )

    def test_unequal_lengths_are_refused(self) -> None:
        with pytest.raises(ValueError, match="2 against 3"):
            paired_difference([0, 1], [0, 1, 1], 10)


class TestAverageAtN:
    def test_each_problem_counts_once_whatever_its_samples(self) -> None:
        # means 3/4, 0, 1 -> avg 7/12; pooling the samples would give 4/7
        rewards = [[1, 1, 0, 1], [0, 0], [1]]
        assert problem_means(rewards) == [0.75, 0.0, 1.0]
        assert average_at_n(rewards, 100).value == pytest.approx(7 / 12)

    def test_a_problem_without_samples_is_named(self) -> None:
        with pytest.raises(ValueError, match="problem 1"):
            average_at_n([[1.0], []], 10)
