"""Clusters and semantic entropy of a JSONL file, a batch of lines at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from entrograd.annotate import semantic_entropy
from entrograd.annotate.clusters import Clusterer, Group
from entrograd.errors import InputError
from entrograd.numerics.kernel_language import kernel_language
from entrograd.rewards.verify.grade import Item, final_answer
from entrograd.rewards.verify.rows import Row, batches


def cluster_file(path: Path | str, cluster: Clusterer, rules: Sequence[str]) -> Iterator[Row]:
    """The rows of a JSONL file, in order, each with its clusters added.

    A row has `problem` and `completions` (a list of texts); optionally `logprobs`, a list of each
    completion's token logprobs, and `finish_reason`, a list of stop or length. Added are
    `cluster_ids`; `semantic_entropy` by estimator in nats, `rao` where there are logprobs,
    `discrete`, and `paper` (of counts where there are none); `kernel_language_entropy`. `rules`
    extract the answers. InputError names the line that cannot be clustered.
    """
    for batch in batches(Path(path)):
        places = [f"{path}: line {number}" for number, _ in batch]
        groups = [_group(row, where, rules) for (_, row), where in zip(batch, places, strict=True)]
        means = [_means(row, where) for (_, row), where in zip(batch, places, strict=True)]
        found = zip(batch, means, cluster(groups), strict=True)
        for (_, row), ell, clustering in found:
            entropies = {} if ell is None else {"rao": semantic_entropy.rao(clustering.ids, ell)}
            entropies["discrete"] = semantic_entropy.discrete(clustering.ids)
            equal = [0.0] * len(clustering.ids)
            entropies["paper"] = semantic_entropy.paper(clustering.ids, ell or equal)
            yield row | {
                "cluster_ids": clustering.ids,
                "semantic_entropy": entropies,
                "kernel_language_entropy": kernel_language(clustering.weights),
            }


def _group(row: Row, where: str, rules: Sequence[str]) -> Group:
    problem, texts = row.get("problem"), row.get("completions")
    if not isinstance(problem, str):
        raise InputError(f"{where}: problem is not a string")
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise InputError(f"{where}: completions are not a list of strings, one or more")
    reasons = row.get("finish_reason", ["stop"] * len(texts))
    if not isinstance(reasons, list) or len(reasons) != len(texts):
        raise InputError(f"{where}: finish_reason is not stop or length, one per completion")
    items = [Item((), text, reason) for text, reason in zip(texts, reasons, strict=True)]
    found = [final_answer(item, rules) for item in items]
    return Group(problem, texts, [extraction and extraction.answer for extraction in found])


def _means(row: Row, where: str) -> list[float] | None:
    """The mean logprob of each completion, None where the row has none."""
    if row.get("logprobs") is None:
        return None
    values, count = row["logprobs"], len(row["completions"])
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(isinstance(tokens, list) and tokens for tokens in values)
        or not all(_finite(number) for tokens in values for number in tokens)
    ):
        raise InputError(
            f"{where}: logprobs are not {count} lists of finite numbers, one per completion and in "
            "it one per token"
        )
    return [sum(tokens) / len(tokens) for tokens in values]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
