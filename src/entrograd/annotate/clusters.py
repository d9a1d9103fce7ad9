"""Clusters of a group's completions: those with equal final answers share one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from entrograd.verify.equivalence import canonical


def answer_clusters(answers: Sequence[str | None]) -> list[int]:
    """Cluster ids of one group's final answers, numbered by first appearance.

    Answers are equal where their canonical forms are; that is an equivalence, so membership does
    not depend on order. A completion without an answer (None) is alone (arXiv 2505.12346v1).
    """
    numbers: dict[Hashable, int] = {}
    return [
        numbers.setdefault(("none", i) if answer is None else canonical(answer).key, len(numbers))
        for i, answer in enumerate(answers)
    ]
