"""What a method does to one group, for learning it by hand. The group is a JSON file; group_file.py
says what it may hold."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from entrograd.errors import InputError
from entrograd.methods.batch import Batch, denominators
from entrograd.methods.catalogue import reader
from entrograd.methods.diagnostics import diagnostics
from entrograd.methods.explain.group_file import Group, read_group
from entrograd.methods.params import MethodParams
from entrograd.methods.presets import CHOICES, COMPONENTS, PRESETS
from entrograd.methods.recipe import Recipe
from entrograd.methods.registry import owner, recipe
from entrograd.numerics import masked
from entrograd.numerics.kernel_language import heat_kernel_eigenvalues, kernel_language
from entrograd.numerics.ratings import rating_entropy
from entrograd.params import check

# A component names columns as the annotated table does; here clusters come from the answers.
SOURCES = {"cluster_id": "answers"}
# Diagnostics of graded rewards, left out of a group that has none.
GRADED = {
    "reward_mean",
    "advantage_correct",
    "advantage_wrong",
    "positive_correct",
    "negative_wrong",
}


class Explanation(TypedDict, total=False):
    """What a method does to one group, as JSON values."""

    method: str
    choices: dict[str, str]  # choice -> component
    params: dict[str, dict[str, object]]  # by component
    rewards: list[float]  # composed
    working: dict[str, dict[str, object]]  # what components compute on the way, if anything
    advantages: list[list[float]]  # ragged
    token_losses: list[list[float]]  # ragged; like the loss, if the group has logprobs
    loss: float
    diagnostics: dict[str, float]


def explain(method: str, group_file: Path | str, settings: Sequence[str] = ()) -> Explanation:
    """The advantages, loss and diagnostics of one group.

    Args:
        method: a name of PRESETS.
        group_file: the group.
        settings: key=value; a key is a parameter of a component in use, COMPONENT.parameter, or one
            of the choices reward, advantage, weighting, loss (the value names a component).

    Without token lists a completion's tokens are equal and one stands for all; an `answer_graph`
    adds its kernel language entropy.

    Raises:
        InputError: names the file and key, or the setting.
    """
    if method not in PRESETS:
        close = difflib.get_close_matches(method, PRESETS) or list(PRESETS)
        raise InputError(f"--method {method}: unknown method; there is {', '.join(close)}")
    group = read_group(group_file)
    try:
        chosen = recipe(check(MethodParams, _section(method, settings), "method"))
        _check_columns(chosen, group, str(group_file))
        batch, logprobs = make_batch(group, str(group_file))
        chosen = _fitted(chosen, batch)
        rewarded = chosen.rewarded(batch)
    except InputError as error:
        raise InputError(str(error).replace("params.yaml: method.", "--set ")) from None
    advantages = chosen.advantages(batch)
    shown = batch.completion_mask
    if not group.tokens:
        shown = shown & (torch.arange(shown.shape[1]) == 0)
    answer: Explanation = {
        "method": method,
        "choices": {part.choice: part.name for part in chosen.components},
        "params": _params(chosen),
        "rewards": rewarded.rewards.tolist(),
    }
    working = _working(chosen, rewarded, shown)
    graph = np.array(group.answer_graph or [], dtype=np.float64)
    if len(graph):
        working["kernel_language"] = {"eigenvalues": heat_kernel_eigenvalues(graph).tolist()}
    if working:
        answer["working"] = working
    answer["advantages"] = _ragged(advantages, shown)
    if logprobs is not None:
        counted = chosen.loss_mask(batch)
        counts = denominators(batch, group.max_length or shown.shape[1], counted)
        loss = chosen.policy_loss(logprobs, advantages, batch)
        answer["token_losses"] = _ragged(loss, shown)
        answer["loss"] = float(chosen.aggregate(loss, counted, counts))
    current = batch.old_logprobs if logprobs is None else logprobs
    measured = diagnostics(chosen, batch, current, advantages)
    left_out = GRADED if group.rewards is None else set()
    answer["diagnostics"] = {k: value for k, value in measured.items() if k not in left_out}
    if len(graph):
        answer["diagnostics"]["kernel_language_entropy"] = kernel_language(graph)
    for place, number in _numbers(answer):
        if not math.isfinite(number):
            raise InputError(f"{group_file}: {place} becomes {number}; give smaller numbers")
    return answer


def _fitted(chosen: Recipe, batch: Batch) -> Recipe:
    """The recipe with the heads' rating entropies, as if this group were the whole data set."""
    if batch.reward_heads is None:
        return chosen
    columns = zip(batch.head_names, batch.reward_heads.T, strict=True)
    return chosen.fitted({name: float(rating_entropy(ratings)) for name, ratings in columns})


def _params(chosen: Recipe) -> dict[str, dict[str, object]]:
    """The parameters in use as in section `method`: by component name, of all of one name."""
    blocks: dict[str, dict[str, object]] = {}
    for part in chosen.components:
        if own := {key: _json(value) for key, value in dataclasses.asdict(part).items()}:
            blocks.setdefault(part.name, {}).update(own)
    return blocks


def _working(chosen: Recipe, batch: Batch, shown: Tensor) -> dict[str, dict[str, object]]:
    """What the components compute on the way, a number per completion or token."""
    steps: dict[str, dict[str, object]] = {}
    for part in chosen.components:
        for name, value in part.working(batch).items():
            listed = _ragged(value, shown) if value.ndim == 2 else value.tolist()
            steps.setdefault(part.name, {})[name] = listed
    return steps


def make_batch(group: Group, where: str) -> tuple[Batch, Tensor | None]:
    """The Batch of one group in float64, and its logprobs if the file has them."""
    size, heads, answers = group.size, group.reward_heads, group.answers
    lengths = [len(row) for row in next(iter(group.tokens.values()), ())]
    lengths = lengths or group.lengths or [1] * size
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded = {key: _pad(value, mask) for key, value in group.tokens.items()}
    if "segment_ids" in padded:
        padded["segment_ids"] = padded["segment_ids"].long()
    logprobs = padded.pop("logprobs", None)
    # Without old_logprobs the completions are the current policy's own: a ratio of 1.
    on_policy = torch.zeros(mask.shape, dtype=torch.float64) if logprobs is None else logprobs
    padded.setdefault("old_logprobs", on_policy)
    batch = Batch(
        completion_mask=mask,
        groups=torch.zeros(size, dtype=torch.long),
        rewards=torch.tensor(group.rewards or [0.0] * size, dtype=torch.float64),
        cluster_ids=None if answers is None else torch.tensor(cluster_ids(answers)),
        answered=None if answers is None else torch.tensor([bool(item) for item in answers]),
        reward_heads=torch.tensor(list(heads.values()), dtype=torch.float64).T if heads else None,
        head_names=tuple(heads),
        names=(where,) * size,
        **padded,
    )
    return batch, logprobs


def cluster_ids(answers: Sequence[str | None]) -> list[int]:
    """A number for each distinct answer; a completion without one is a cluster of its own."""
    first: dict[str, int] = {}
    return [first.setdefault(a, number) if a else number for number, a in enumerate(answers)]


def _section(method: str, settings: Sequence[str]) -> dict[str, object]:
    """Section `method` of params.yaml as the settings would write it."""
    section = {"name": method}
    parameters: list[tuple[str, str, str]] = []  # component, or "" for whichever has it; key; value
    names = dict.fromkeys(name for names in COMPONENTS.values() for name in names)
    for setting in settings:
        key, equals, text = setting.partition("=")
        block, dot, name = key.rpartition(".")
        if not equals or not name or "." in block or (dot and not block):
            raise InputError(
                f"--set {setting}: expected key=value, the key a parameter of {method}, "
                f"COMPONENT.parameter, or one of {', '.join(CHOICES)}"
            )
        if not dot and key in CHOICES:
            if not text:
                raise InputError(
                    f"--set {setting}: name a component; `entrograd methods` lists them"
                )
            section[key] = text
        elif not block or block in names:
            parameters.append((block, name, text))
        else:
            raise InputError(
                f"--set {block}: unknown key; before the dot stands one of {', '.join(names)}"
            )
    used = check(MethodParams, section, "method").choices
    blocks: dict[str, dict[str, object]] = {}
    for block, name, text in parameters:
        part = None if block else owner(name, used)
        blocks.setdefault(part.name if part else block or method, {})[name] = _value(text)
    return {**section, **blocks}


def _value(text: str) -> object:
    """A number, true, false, null or a JSON value if it reads as one, else text."""
    try:
        value: object = json.loads(text)
        return value
    except (ValueError, RecursionError):
        pass
    try:
        return float(text)  # inf, .5
    except ValueError:
        return text


def _check_columns(chosen: Recipe, group: Group, where: str) -> None:
    """InputError if a column that a component reads is missing."""
    columns: dict[str, object] = {
        **group.tokens,
        "rewards": group.rewards,
        "answers": group.answers,
        "reward_heads": group.reward_heads,
    }
    for column in sorted(chosen.required_columns):
        key = SOURCES.get(column, column)
        if not columns.get(key):
            raise InputError(f"{where}: {key} is missing; {reader(chosen, column)} reads it")
    # EMPO and ENCORE make the reward themselves; whoever reads the graded one says so by NaN.
    if group.rewards is None:
        batch, _ = make_batch(group, where)
        unknown = dataclasses.replace(batch, rewards=torch.full_like(batch.rewards, math.nan))
        chosen = _fitted(chosen, batch)
        if not torch.isfinite(chosen.reward.rewards(unknown)).all():
            raise InputError(f"{where}: rewards is missing: one number per completion")
        if chosen.advantage.by_correctness:
            raise InputError(f"{where}: rewards is missing; {chosen.advantage.name} splits by it")


def _pad(rows: Sequence[Sequence[float]], mask: Tensor) -> Tensor:
    padded = torch.zeros(mask.shape, dtype=torch.float64)
    padded[mask] = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
    return padded


def _ragged(values: Tensor, mask: Tensor) -> list[list[float]]:
    values = masked.fill(values, mask)
    values = values + 0.0 if values.is_floating_point() else values  # no -0.0
    return [row[chosen].tolist() for row, chosen in zip(values, mask, strict=True)]


def _json(value: object) -> object:
    """`value` with infinities as text, which JSON has no number for."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: object, place: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a JSON value, with where it stands: `advantages[0][2]`."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _numbers(item, f"{place}[{number}]")
    elif isinstance(value, (int, float)):
        yield place, value
