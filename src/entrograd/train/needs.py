"""What a recipe needs of the run it is used in, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from entrograd.errors import InputError
from entrograd.methods.base import Recipe


def check_needs(
    recipe: Recipe, section: str, reference: str | None, heads: Collection[str] | None
) -> None:
    """InputError where stage `section` of params.yaml can't have a column that `recipe` reads.

    Args:
        reference: the section's reference model.
        heads: the names of annotate.heads; None where a table's own decide.
    """
    who = f"method {recipe.name} (with its reward, credit, modulation and loss)"
    if "ref_logprobs" in recipe.needs and reference is None:
        raise InputError(
            f"params.yaml: {section}.reference: {who} reads ref_logprobs; name the folder of a "
            "reference model, such as models/base"
        )
    if "reward_heads" in recipe.needs and heads is not None and not heads:
        raise InputError(
            f"params.yaml: annotate.heads: {who} reads reward_heads; name some, such as "
            "{format: {}, brevity: {}}"
        )
    if "token_scores" in recipe.needs and section == "train_online":
        raise InputError(
            f"params.yaml: method: {who} reads token_scores, which only a table of your own can "
            "hold (train_offline)"
        )


def check_columns(recipe: Recipe, rows: Iterable[Mapping[str, Any]], where: str) -> None:
    """InputError where a column that `recipe` reads is empty in some row; ref_logprobs are the
    trainer's own."""
    columns = sorted(recipe.needs - {"ref_logprobs"})
    for number, row in enumerate(rows):
        for column in columns:
            if row.get(column) in (None, []):
                raise InputError(
                    f"{where}: row {number}: {column} is empty and method {recipe.name} needs it; "
                    "annotate the rollouts with it or choose another method"
                )


def with_heads(recipe: Recipe, heads: Collection[str], entropies: Mapping[str, float]) -> Recipe:
    """`recipe` for completions with reward heads of these names, whose ratings have these
    entropies (nats); InputError where its reward can't be composed of them."""
    fitted = recipe.fitted(entropies)
    fitted.check_heads(tuple(heads))
    return fitted
