"""What a recipe needs of the run it is used in, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches

import pyarrow as pa
import pyarrow.compute as pc

from entrograd.errors import InputError
from entrograd.methods.recipe import Recipe
from entrograd.storage.metrics import CURVE
from entrograd.train.params import TrainParams


def check_required_columns(
    recipe: Recipe,
    section: str,
    stage: TrainParams,
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
    if best == "heldout_accuracy" and getattr(stage, "evaluate", None) is None:
        raise InputError(
            f"params.yaml: {section}.checkpoint.keep_best: heldout_accuracy is not measured; set "
            "train_online.evaluate, such as {every_rounds: 10, problems: 128}"
        )
    who = f"method {recipe.name} (with its reward, credit, modulation and loss)"
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


def check_columns(recipe: Recipe, table: pa.Table, first_row: int = 0, *, where: str) -> None:
    """InputError where a column that `recipe` reads is empty in some row of an annotated table,
    which begins at `first_row` of `where`; ref_logprobs are the trainer's own."""
    bad: list[tuple[int, str]] = []
    for name in sorted(recipe.required_columns - {"ref_logprobs"}):
        column = table[name]
        empty = pc.is_null(column)
        if pa.types.is_list(column.type):
            empty = pc.or_(empty, pc.equal(pc.fill_null(pc.list_value_length(column), 0), 0))
        if (row := pc.index(empty, True).as_py()) >= 0:
            bad.append((row, name))
    if bad:
        row, name = min(bad, key=lambda pair: pair[0])
        raise InputError(
            f"{where}: row {first_row + row}: {name} is empty and method {recipe.name} needs it; "
            "annotate the rollouts with it or choose another method"
        )


def with_heads(recipe: Recipe, heads: Collection[str], entropies: Mapping[str, float]) -> Recipe:
    """`recipe` for completions with reward heads of these names, whose ratings have these
    entropies (nats); InputError where its reward can't be composed of them."""
    fitted = recipe.fitted(entropies)
    fitted.check_heads(tuple(heads))
    return fitted
