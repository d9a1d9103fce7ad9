"""Semantic entropy of one group, in nats and float64: uncertainty over answers, not wordings.

G completions with cluster ids (equal = same answer) and ell_i = mean_t log pi_old(o_{i,t}).
SEED-GRPO, arXiv 2505.12346v1; its largest value is ln G, for `paper` there is none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def cluster_masses(cluster_ids: Sequence[int], ell: Sequence[float]) -> dict[int, float]:
    """p_k = sum_{i in C_k} exp(ell_i) / sum_i exp(ell_i), by cluster id.

    Raises ValueError for an empty group, unequal lengths or a non-finite ell.
    """
    if not cluster_ids or len(cluster_ids) != len(ell) or not all(map(math.isfinite, ell)):
        raise ValueError(
            f"{len(cluster_ids)} cluster ids and ell {list(ell)}: need one finite each"
        )
    top = max(ell)
    weights = [math.exp(value - top) for value in ell]
    members: dict[int, list[float]] = {}
    for cluster, weight in zip(cluster_ids, weights, strict=True):
        members.setdefault(cluster, []).append(weight)
    total = math.fsum(weights)
    return {cluster: math.fsum(held) / total for cluster, held in members.items()}


def rao(cluster_ids: Sequence[int], ell: Sequence[float]) -> float:
    """-sum_k p_k ln p_k over the likelihood masses of the clusters."""
    masses = cluster_masses(cluster_ids, ell).values()
    return -math.fsum(p * math.log(p) for p in masses if p > 0) + 0.0  # not -0.0


def discrete(cluster_ids: Sequence[int]) -> float:
    """-sum_k (n_k / G) ln(n_k / G): rao of equally likely completions."""
    fractions = [count / len(cluster_ids) for count in Counter(cluster_ids).values()]
    return -math.fsum(p * math.log(p) for p in fractions) + 0.0


def paper(cluster_ids: Sequence[int], ell: Sequence[float]) -> float:
    """-(1/K) sum_k ln p_k over the K clusters, Eq. 5 as printed; not bounded by ln G."""
    masses = cluster_masses(cluster_ids, ell).values()
    smallest = 5e-324  # a mass that underflowed counts as the smallest positive number
    return -math.fsum(math.log(max(p, smallest)) for p in masses) / len(masses) + 0.0
