"""Token log-probabilities and entropies of rollouts, checked: one finite value per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from entrograd.annotate.params import AnnotateParams
from entrograd.data.groups import Completion, PromptGroup
from entrograd.errors import InputError

TokenValues = tuple[np.ndarray, np.ndarray]  # old_logprobs and entropies, [T] each, nats
# Groups -> the values of each completion, group after group.
Score = Callable[[Sequence[PromptGroup]], Sequence[TokenValues]]


def token_values(groups: Sequence[PromptGroup], score: Score) -> Sequence[TokenValues]:
    """(old_logprobs, entropies) of each completion, group after group, in nats.

    InputError names prompt_id and sample_index of a completion without tokens or with a non-finite
    value; ValueError if `score` gives another number of values than there are tokens.
    """
    pairs = [(group, completion) for group in groups for completion in group.completions]
    for group, completion in pairs:
        if not len(completion) or not len(group.prompt_ids):
            empty = "completion_ids" if len(group.prompt_ids) else "prompt_ids"
            raise InputError(
                f"{label(group, completion)}: {empty} is empty; drop the row or give its tokens"
            )
    scored = score(groups)
    if len(scored) != len(pairs):
        raise ValueError(f"{len(scored)} scores for {len(pairs)} completions")
    for (group, completion), values in zip(pairs, scored, strict=True):
        for column, numbers in zip(("old_logprobs", "entropies"), values, strict=True):
            if len(numbers) != len(completion):
                raise ValueError(
                    f"{label(group, completion)}: {len(numbers)} {column} for {len(completion)} "
                    "tokens"
                )
            finite = np.isfinite(numbers)
            if not finite.all():
                bad = int(finite.argmin())
                raise InputError(
                    f"{label(group, completion)}: {column} is {numbers[bad]} at token {bad}; check "
                    "the model's weights, or compute in float32 (annotate.dtype)"
                )
    return scored


def scorer(params: AnnotateParams, model: Path, temperature: float) -> tuple[Score, str]:
    """Load the model: the score function of groups, and the version of its weights."""
    from entrograd.models.forward import score
    from entrograd.models.load import context_length, load_model, policy_version

    loaded = load_model(model, params.dtype, params.device)
    vocabulary, context = loaded.get_input_embeddings().num_embeddings, context_length(loaded)

    def score_groups(groups: Sequence[PromptGroup]) -> Sequence[TokenValues]:
        pairs = [(group, completion) for group in groups for completion in group.completions]
        for group, completion in pairs:
            _check_fits(group, completion, vocabulary, context, model)
        return score(
            loaded,
            [group.prompt_ids for group, _ in pairs],
            [completion.completion_ids for _, completion in pairs],
            temperature,
            params.token_budget,
        )

    return score_groups, policy_version(loaded)


def _check_fits(
    group: PromptGroup, completion: Completion, vocabulary: int, context: int, model: Path
) -> None:
    tokens = np.concatenate([group.prompt_ids, completion.completion_ids])
    if len(tokens) > context:
        raise InputError(
            f"{label(group, completion)}: {len(tokens)} tokens do not fit the context of {model} "
            f"({context}); drop the row or give the model that sampled it"
        )
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise InputError(
            f"{label(group, completion)}: token {tokens.max()} is not in the vocabulary of {model} "
            f"({vocabulary}); give the model that sampled it"
        )


def label(group: PromptGroup, completion: Completion) -> str:
    """How messages name a completion."""
    return f"prompt_id {group.prompt_id}, sample_index {completion.sample_index}"
