"""Token log-probabilities and entropies of rollouts, checked: one finite value a token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from entrograd.annotate.params import AnnotateParams
from entrograd.errors import InputError

Row = Mapping[str, Any]
TokenValues = tuple[list[float], list[float]]
Score = Callable[[list[dict[str, Any]]], list[TokenValues]]


def token_values(rows: Sequence[Row], score: Score) -> list[TokenValues]:
    """(old_logprobs, entropies) of each rollout row, in nats, one value a completion token.

    InputError names prompt_id and sample_index of a row without tokens or of a non-finite value;
    ValueError where `score` gives another number of values than there are tokens.
    """
    for row in rows:
        if not row["completion_ids"] or not row["prompt_ids"]:
            empty = "prompt_ids" if not row["prompt_ids"] else "completion_ids"
            raise InputError(f"{name(row)}: {empty} is empty; drop the row or give its tokens")
    scored = score([dict(row) for row in rows])
    if len(scored) != len(rows):
        raise ValueError(f"{len(scored)} scores for {len(rows)} completions")
    for row, values in zip(rows, scored, strict=True):
        for column, numbers in zip(("old_logprobs", "entropies"), values, strict=True):
            if len(numbers) != len(row["completion_ids"]):
                raise ValueError(
                    f"{name(row)}: {len(numbers)} {column} for {len(row['completion_ids'])} tokens"
                )
            bad = next((i for i, number in enumerate(numbers) if not math.isfinite(number)), None)
            if bad is not None:
                raise InputError(
                    f"{name(row)}: {column} is {numbers[bad]} at token {bad}; check the model's "
                    "weights, or compute in float32 (annotate.dtype)"
                )
    return scored


def scorer(params: AnnotateParams, model: Path, temperature: float) -> tuple[Score, str]:
    """Load the model: the score function of rows, and the version of its weights."""
    from entrograd.models.forward import score
    from entrograd.models.load import context_length, load_model, policy_version

    loaded = load_model(model, params.dtype, params.device)
    vocabulary, context = loaded.get_input_embeddings().num_embeddings, context_length(loaded)

    def score_rows(rows: list[dict[str, Any]]) -> list[TokenValues]:
        for row in rows:
            _check_fits(row, vocabulary, context, model)
        return score(
            loaded,
            [row["prompt_ids"] for row in rows],
            [row["completion_ids"] for row in rows],
            temperature,
            params.token_budget,
        )

    return score_rows, policy_version(loaded)


def _check_fits(row: Row, vocabulary: int, context: int, model: Path) -> None:
    tokens = [*row["prompt_ids"], *row["completion_ids"]]
    if len(tokens) > context:
        raise InputError(
            f"{name(row)}: {len(tokens)} tokens do not fit the context of {model} ({context}); "
            "drop the row or give the model that sampled it"
        )
    if min(tokens) < 0 or max(tokens) >= vocabulary:
        raise InputError(
            f"{name(row)}: token {max(tokens)} is not in the vocabulary of {model} "
            f"({vocabulary}); give the model that sampled it"
        )


def name(row: Row) -> str:
    """How messages name a rollout row."""
    return f"prompt_id {row['prompt_id']}, sample_index {row['sample_index']}"
