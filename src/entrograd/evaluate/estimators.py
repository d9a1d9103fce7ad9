"""Accuracy with an interval, and the difference of two models on the same problems.

The unit of uncertainty is the problem: intervals say what another draw of problems of the same
kind would give, never what another draw of samples of the same problems would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

BLOCK = 1_000_000  # resampled indexes held at once


@dataclass(frozen=True)
class Interval:
    """A point estimate and the confidence interval about it."""

    value: float
    low: float
    high: float


def wilson(correct: int, n: int, confidence: float = 0.95) -> Interval:
    """One proportion, `correct` of `n`, with the Wilson score interval.

    The p for which |k/n - p| <= z sqrt(p (1 - p) / n), z the normal quantile of `confidence`
    (Wilson 1927, doi 10.1080/01621459.1927.10502953). Unlike the normal interval it stays inside
    [0, 1] and has a width at 0 and n correct. Raises ValueError where n < 1 or k is not in [0, n].
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"{correct} correct of {n}: need n >= 1 and 0 <= correct <= n")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    fraction = correct / n
    scale = 1 + z * z / n
    centre = (fraction + z * z / (2 * n)) / scale
    half = z * math.sqrt(fraction * (1 - fraction) / n + z * z / (4 * n * n)) / scale
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == n else min(1.0, centre + half)
    return Interval(fraction, low, high)


def bootstrap_mean(
    values: Sequence[float], resamples: int, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The mean of one value per problem with its percentile bootstrap interval.

    Problems are drawn with replacement `resamples` times by a generator of its own, seeded with
    `seed`: the result is a function of the arguments. (Efron and Tibshirani 1993, chapter 13.)
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError("bootstrap: need one value per problem and at least one problem")
    generator = np.random.default_rng(seed)
    rows = max(1, BLOCK // len(array))
    means: list[NDArray[np.float64]] = []
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), len(array))
        means.append(array[generator.integers(0, len(array), size=shape)].mean(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(array.mean()), float(low), float(high))


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    resamples: int,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """mean(second - first), both models' values of the same problems in the same order.

    Resampling problems keeps each pair together, so what makes a problem hard for both models
    cancels, and the interval is narrower than the two models' own intervals suggest. Where the
    differences are `all_alike` it has no width, however few the problems: it says nothing then.
    """
    if len(first) != len(second):
        raise ValueError(f"paired difference: {len(first)} against {len(second)} problems")
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    return bootstrap_mean(differences.tolist(), resamples, confidence, seed)


def all_alike(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the differences of all problems are one number, up to rounding: resampling equal
    numbers gives that number again, never how sure it is."""
    return bool(np.ptp(np.subtract(second, first, dtype=np.float64)) < 1e-9)


def average_at_n(
    rewards: Sequence[Sequence[float]], resamples: int, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """avg@n: the mean over problems of each problem's mean reward over its n samples.

    An unbiased estimate of pass@1 at the sampling temperature; the interval resamples problems.
    """
    return bootstrap_mean(problem_means(rewards), resamples, confidence, seed)


def problem_means(rewards: Sequence[Sequence[float]]) -> list[float]:
    """The mean reward of each problem's samples; ValueError where a problem has none."""
    for index, samples in enumerate(rewards):
        if not samples:
            raise ValueError(f"problem {index} has no samples")
    return [math.fsum(samples) / len(samples) for samples in rewards]
