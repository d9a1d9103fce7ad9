"""What a recipe needs of the run it is used in, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from entrograd.errors import InputError
from entrograd.methods.recipe import Recipe
from entrograd.storage.metrics import CURVE
from entrograd.train.params import TrainOfflineParams, TrainOnlineParams


def check_required_columns(
    recipe: Recipe,
    section: str,
    stage: TrainOfflineParams | TrainOnlineParams,
    heads: Collection[str] | None,
) -> None:
    """InputError where section `section` of params.yaml, `stage`, can't have a column that
    `recipe` reads, or no curve has the one it names.

    Args:
        heads: the names of annotate.heads; None where a table's own decide.
    """
    best = (stage.checkpoint.keep_best or "loss").removeprefix("-")
    if best not in CURVE and not best.startswith("weight_"):
        allowed = get_close_matches(best, CURVE, 3) or sorted(CURVE)
        raise InputError(
            f"params.yaml: {section}.checkpoint.keep_best: no learning curve has {best!r}; take "
            f"{', '.join(allowed)} ('-' before it: the lowest is best)"
        )
    who = f"method {recipe.name} (with its reward, advantage, weighting and loss)"
    if "ref_logprobs" in recipe.required_columns and stage.reference is None:
        raise InputError(
            f"params.yaml: {section}.reference: {who} reads ref_logprobs; name the folder of a "
            "reference model, such as models/base"
        )
    if "reward_heads" in recipe.required_columns and heads is not None and not heads:
        raise InputError(
            f"params.yaml: annotate.heads: {who} reads reward_heads; name some, such as "
            "{format: {}, brevity: {}}"
        )
    if "token_scores" in recipe.required_columns and section == "train_online":
        raise InputError(
            f"params.yaml: method: {who} reads token_scores, which only a table of your own can "
            "hold (train_offline)"
        )


def check_columns(recipe: Recipe, rows: Iterable[Mapping[str, Any]], where: str) -> None:
    """InputError where a column that `recipe` reads is empty in some row; ref_logprobs are the
    trainer's own."""
    columns = sorted(recipe.required_columns - {"ref_logprobs"})
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
