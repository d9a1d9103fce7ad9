"""The semantic entropy of a batch's groups over clusters of equal answers."""

from __future__ import annotations

from torch import Tensor

from entrograd.methods.batch import Batch
from entrograd.numerics import masked
from entrograd.numerics.semantic_entropy import Estimator, semantic_entropy


def mean_logprobs(batch: Batch) -> Tensor:
    """[B] ell_i = mean_t log pi_old(o_{i,t}), nats, float64."""
    return masked.means(batch.old_logprobs.double(), batch.completion_mask)


def group_entropy(batch: Batch, estimator: Estimator) -> Tensor:
    """[B] the semantic entropy of each completion's group in nats, float64."""
    clusters = batch.require("cluster_ids")
    return semantic_entropy(mean_logprobs(batch), batch.groups, clusters, estimator)
