"""Clusters of completions that mean the same, and the graph of their answers.

What is compared of a completion is its node: its final answer or its whole text, as the parameters
say. One without is alone. Membership depends on which nodes a group has, never on their order:

- `answer` and `entailment` say yes or no of a pair, and yes need not carry over to a third. It is
  made to: completions are together where a chain of pairs connects them (union-find).
- `embedding` measures similarity, where chains would drift from one meaning to another: every two
  members of a cluster are similar (complete linkage). The most similar clusters merge first; of
  equally similar ones those whose texts come first in alphabetical order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from entrograd.annotate.params import (
    AnswerClusters,
    ClusterParams,
    EmbeddingClusters,
    EntailmentClusters,
)
from entrograd.rewards.verify.equivalence import canonical
from entrograd.rewards.verify.grade import Grader

if TYPE_CHECKING:
    from entrograd.annotate.encoders import Embed, Judge


@dataclass(frozen=True)
class Group:
    """The completions of one problem: each one's text, and its final answer (None: it has none)."""

    problem: str
    completions: Sequence[str]
    answers: Sequence[str | None]


@dataclass(frozen=True)
class Clustering:
    """ids: [G] the cluster of each completion, numbered by first appearance. weights: [G, G]
    symmetric, the edges of the answer graph: how much i says j and j says i, each in [0, 1],
    added; 0 on the diagonal."""

    ids: list[int]
    weights: np.ndarray


Clusterer = Callable[[Sequence[Group]], list[Clustering]]


def clusterer(params: ClusterParams, grader: Grader, device: str) -> Clusterer:
    """The function that clusters groups; a model it needs is loaded here, once.

    `grader` compares answers where `params.match` is mathematical. InputError where the model
    cannot be had or is of another kind.
    """
    if isinstance(params, AnswerClusters):
        comparing = grader if params.match == "mathematical" else None
        return lambda groups: by_answer(groups, comparing)
    if isinstance(params, EmbeddingClusters):
        from entrograd.annotate.encoders import load_embedder

        embed = load_embedder(params, device)
        return lambda groups: by_embedding(groups, params, embed)
    from entrograd.annotate.encoders import load_judge

    judge = load_judge(params, device)
    return lambda groups: by_entailment(groups, params, judge)


# --- equal answers ---------------------------------------------------------------------------


def by_answer(groups: Sequence[Group], grader: Grader | None = None) -> list[Clustering]:
    """Answers are equal where their canonical forms are (arXiv 2505.12346v1) or, with a `grader`,
    where it takes each of the two for the other."""
    rows = [[canonical(a).key if a else None for a in group.answers] for group in groups]
    keys = [_unique(row) for row in rows]
    links: list[list[tuple[int, int]]] = [[] for _ in groups]
    if grader is not None:
        links = _equal_pairs([_spellings(group.answers) for group in groups], grader)
    return [_clustering(*parts, None) for parts in zip(rows, keys, links, strict=True)]


def _spellings(answers: Sequence[str | None]) -> list[str]:
    """For each canonical key, in order, its first spelling in alphabetical order."""
    found = {canonical(text).key: text for text in reversed(_unique(answers))}
    return [found[key] for key in sorted(found)]


def _equal_pairs(groups: Sequence[Sequence[str]], grader: Grader) -> list[list[tuple[int, int]]]:
    """Of each group the pairs of answers, by index, that the grader takes for equal both ways."""
    pairs = [
        (group, a, b)
        for group, answers in enumerate(groups)
        for a, b in combinations(range(len(answers)), 2)
    ]
    # The second direction only where the first holds: most pairs differ.
    for forth in (True, False):
        asked = [
            ((groups[g][a],), groups[g][b]) if forth else ((groups[g][b],), groups[g][a])
            for g, a, b in pairs
        ]
        outcomes = grader.compare(asked)
        pairs = [p for p, outcome in zip(pairs, outcomes, strict=True) if outcome.value is True]
    links: list[list[tuple[int, int]]] = [[] for _ in groups]
    for group, a, b in pairs:
        links[group].append((a, b))
    return links


# --- similar texts ---------------------------------------------------------------------------


def by_embedding(
    groups: Sequence[Group], params: EmbeddingClusters, embed: Embed
) -> list[Clustering]:
    """Texts whose embeddings have a cosine of at least `params.threshold`, each with each.

    Each text is embedded once. The graph's weights are 2 max(0, cosine).
    """
    rows = [_nodes(group, params.text) for group in groups]
    texts = _unique(text for row in rows for text in row)
    vectors = embed(texts).astype(np.float64) if texts else np.zeros((0, 1))
    place = {text: index for index, text in enumerate(texts)}
    found = []
    for row in rows:
        unique = _unique(row)
        members = vectors[[place[text] for text in unique]]
        cosine = members @ members.T
        cosine = np.minimum(cosine, cosine.T).clip(0, 1)
        np.fill_diagonal(cosine, 1)
        links = list(enumerate(complete_linkage(cosine, params.threshold)))
        found.append(_clustering(row, unique, links, 2 * cosine))
    return found


def complete_linkage(similarity: np.ndarray, threshold: float) -> list[int]:
    """Of each of N items the first member of its cluster: the two clusters whose least similar
    members are the most similar merge, as long as these are at least `threshold`.

    `similarity` [N, N] is symmetric; of equal ones the clusters of the smallest indexes go first.
    """
    least = similarity.copy()
    np.fill_diagonal(least, -np.inf)
    first = list(range(len(least)))
    while least.size and least.max() >= threshold:
        a, b = divmod(int(least.argmax()), len(least))  # a < b: the first of two equal cells
        least[a] = least[:, a] = np.minimum(least[a], least[b])
        least[b] = least[:, b] = -np.inf
        first = [a if cluster == b else cluster for cluster in first]
    return first


# --- texts that entail each other ------------------------------------------------------------


def by_entailment(
    groups: Sequence[Group], params: EntailmentClusters, judge: Judge
) -> list[Clustering]:
    """Texts of which each entails the other, behind the problem (arXiv 2302.09664); chains of
    them are one cluster. Each ordered pair of different texts is judged once."""
    rows = [_nodes(group, params.text) for group in groups]
    says = [
        [f"{group.problem} {text}".strip() for text in _unique(row)]
        for group, row in zip(groups, rows, strict=True)
    ]
    pairs = sorted({(a, b) for texts in says for a in texts for b in texts if a != b})
    judged = dict(zip(pairs, judge(pairs), strict=True))
    found = []
    for row, texts in zip(rows, says, strict=True):
        entails = np.array([[judged.get((a, b), 1.0) for b in texts] for a in texts])
        entails = entails.reshape(len(texts), len(texts))
        both = np.minimum(entails, entails.T) == 1
        links = list(zip(*both.nonzero(), strict=True))
        found.append(_clustering(row, _unique(row), links, entails + entails.T))
    return found


# --- nodes, ids, graph -----------------------------------------------------------------------


def _nodes(group: Group, text: str) -> list[str | None]:
    """What is compared of each completion; a blank text is none."""
    chosen = group.answers if text == "answer" else group.completions
    return [(node or "").strip() or None for node in chosen]


def _unique(nodes: Iterable[str | None]) -> list[str]:
    return sorted({node for node in nodes if node is not None})


def _clustering(
    nodes: Sequence[str | None],
    unique: Sequence[str],
    links: Iterable[tuple[int, int]],
    weights: np.ndarray | None,
) -> Clustering:
    """Clusters of nodes, where `links` join indexes of `unique`; None is alone.

    `weights` [U, U] is between unique nodes; None: 2 within a cluster, 0 between clusters.
    """
    parent = list(range(len(unique)))

    def root(index: int) -> int:
        while parent[index] != index:
            index = parent[index]
        return index

    for a, b in links:
        parent[root(b)] = root(a)
    place = {text: index for index, text in enumerate(unique)}
    numbers: dict[Hashable, int] = {}
    ids = []
    for position, node in enumerate(nodes):
        cluster = ("alone", position) if node is None else root(place[node])
        ids.append(numbers.setdefault(cluster, len(numbers)))
    if weights is None:
        full = 2.0 * np.equal.outer(ids, ids)
    else:
        spot = [-1 if node is None else place[node] for node in nodes]
        full = np.pad(weights, (0, 1))[np.ix_(spot, spot)]  # the last row and column: no node
    np.fill_diagonal(full, 0)
    return Clustering(ids, full)
