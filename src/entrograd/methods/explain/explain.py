"""What a method does to one group, for learning it by hand. The group is a JSON file; group_file.py
says what it may hold."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entrograd.errors import InputError
from entrograd.methods.base import Batch, Recipe, denominators
from entrograd.methods.catalogue import reader
from entrograd.methods.diagnostics import diagnostics
from entrograd.methods.explain.group_file import COMPLETION_KEYS, TOKEN_KEYS, read_group
from entrograd.methods.params import CHOICES, MethodParams
from entrograd.methods.registry import METHODS, recipe
from entrograd.numerics import masked
from entrograd.numerics.kernel_language import heat_kernel_eigenvalues, kernel_language
from entrograd.numerics.ratings import rating_entropy
from entrograd.params import check

# A method names its needs as the annotated table does; here clusters come from the answers.
SOURCES = {"cluster_id": "answers"}
# Diagnostics of graded rewards, left out of a group that has none.
GRADED = {
    "reward_mean",
    "advantage_correct",
    "advantage_wrong",
    "positive_correct",
    "negative_wrong",
}


def explain(method: str, group_file: Path | str, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The advantages, loss and diagnostics of one group, as JSON values.

    Args:
        method: a name of METHODS.
        group_file: the group.
        settings: key=value; a key is a parameter of `method`, OTHER.parameter of another one, or
            one of the choices reward, credit, modulation, loss (the value names a method).

    Returns:
        `method`, `choices`, `params`, `rewards` (composed), `working` (what its choices compute on
        the way), `advantages` (ragged), `token_losses` and `loss` where logprobs are given,
        `diagnostics`. Without token lists a completion's tokens are equal and one stands for all;
        an `answer_graph` adds its kernel language entropy.

    Raises:
        InputError: names the file and key, or the setting.
    """
    if method not in METHODS:
        close = difflib.get_close_matches(method, METHODS) or list(METHODS)
        raise InputError(f"--method {method}: unknown method; there is {', '.join(close)}")
    data = read_group(group_file)
    try:
        chosen = recipe(check(MethodParams, _section(method, settings), "method"))
        _check_needs(chosen, data, str(group_file))
        batch, logprobs = make_batch(data, str(group_file))
        chosen = _fitted(chosen, batch)
        credited = chosen.rewarded(batch)
    except InputError as error:
        raise InputError(str(error).replace("params.yaml: method.", "--set ")) from None
    advantages = chosen.advantages(batch)
    shown = batch.completion_mask
    if not set(TOKEN_KEYS) & set(data):
        shown = shown & (torch.arange(shown.shape[1]) == 0)
    answer: dict[str, Any] = {
        "method": method,
        "choices": {choice: getattr(chosen, choice).name for choice in CHOICES},
        "params": _json(dataclasses.asdict(chosen.params[method])),
        "rewards": credited.rewards.tolist(),
    }
    others = {getattr(chosen, choice).name for choice in CHOICES} - {method}
    for name in sorted(others):
        parameters = _json(dataclasses.asdict(chosen.params[name]))
        answer.setdefault("other_params", {})[name] = parameters
    working = _working(chosen, credited, shown)
    graph = np.array(data.get("answer_graph", []), dtype=np.float64)
    if len(graph):
        working["kernel_language"] = {"eigenvalues": heat_kernel_eigenvalues(graph).tolist()}
    if working:
        answer["working"] = working
    answer["advantages"] = _ragged(advantages, shown)
    if logprobs is not None:
        counted = chosen.loss_mask(batch)
        longest = data.get("max_length", batch.completion_mask.shape[1])
        counts = denominators(batch, longest, counted)
        loss = chosen.policy_loss(logprobs, advantages, batch)
        answer["token_losses"] = _ragged(loss, shown)
        answer["loss"] = float(chosen.aggregate(loss, counted, counts))
    current = batch.old_logprobs if logprobs is None else logprobs
    found = diagnostics(chosen, batch, current, advantages)
    left_out = GRADED if "rewards" not in data else set()
    answer["diagnostics"] = {name: found[name] for name in found if name not in left_out}
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


def _working(chosen: Recipe, batch: Batch, shown: Tensor) -> dict[str, Any]:
    """What the four choices compute on the way, a number a completion or a token."""
    found: dict[str, Any] = {}
    for choice in CHOICES:
        method = getattr(chosen, choice)
        if method.working is None or method.about != choice:
            continue
        values = method.working(batch, chosen.params[method.name])
        found[method.name] = {
            name: _ragged(value, shown) if value.ndim == 2 else value.tolist()
            for name, value in values.items()
        }
    return found


def make_batch(data: Mapping[str, Any], where: str) -> tuple[Batch, Tensor | None]:
    """The Batch of one group in float64, and its logprobs where the file has them."""
    tokens = {key: data[key] for key in TOKEN_KEYS if key in data}
    heads = data["reward_heads"]
    lists = [*tokens.values(), *heads.values()]
    lists += [data[key] for key in COMPLETION_KEYS if key in data]
    size = len(lists[0])
    lengths = [len(row) for row in next(iter(tokens.values()), ())]
    lengths = lengths or data.get("lengths") or [1] * size
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded = {key: _pad(value, mask) for key, value in tokens.items()}
    if "segment_ids" in padded:
        padded["segment_ids"] = padded["segment_ids"].long()
    logprobs = padded.pop("logprobs", None)
    # Without old_logprobs the completions are the current policy's own: a ratio of 1.
    on_policy = torch.zeros(mask.shape, dtype=torch.float64) if logprobs is None else logprobs
    padded.setdefault("old_logprobs", on_policy)
    answers = data.get("answers")
    batch = Batch(
        completion_mask=mask,
        groups=torch.zeros(size, dtype=torch.long),
        rewards=torch.tensor(data.get("rewards", [0.0] * size), dtype=torch.float64),
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
    seen: dict[str, int] = {}
    numbers: list[int] = []
    for number, answer in enumerate(answers):
        numbers.append(seen.setdefault(answer, number) if answer else number)
    return numbers


def _section(method: str, settings: Sequence[str]) -> dict[str, Any]:
    """Section `method` of params.yaml as the settings would write it."""
    section: dict[str, Any] = {"name": method}
    for setting in settings:
        key, equals, text = setting.partition("=")
        block, dot, name = key.rpartition(".")
        if not equals or not name or "." in block or (dot and not block):
            raise InputError(
                f"--set {setting}: expected key=value, the key a parameter of {method}, "
                f"METHOD.parameter, or one of {', '.join(CHOICES)}"
            )
        if not dot and key in CHOICES:
            if not text:
                raise InputError(f"--set {setting}: name a method; `entrograd methods` lists them")
            section[key] = text
        elif (block or method) in METHODS:
            section.setdefault(block or method, {})[name] = _value(text)
        else:
            raise InputError(
                f"--set {block}: unknown key; before the dot stands one of {', '.join(METHODS)}"
            )
    return section


def _value(text: str) -> Any:
    """A number, true, false, null or a JSON value where it reads as one, else text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return float(text)  # inf, .5
    except ValueError:
        return text


def _check_needs(chosen: Recipe, data: Mapping[str, Any], where: str) -> None:
    for need in sorted(chosen.required_columns):
        key = SOURCES.get(need, need)
        if not data.get(key):
            raise InputError(f"{where}: {key} is missing; {reader(chosen, need)} reads it")
    # EMPO and ENCORE make the reward themselves; whoever reads the graded one says so by NaN.
    if "rewards" not in data:
        batch, _ = make_batch(data, where)
        unknown = dataclasses.replace(batch, rewards=torch.full_like(batch.rewards, math.nan))
        chosen = _fitted(chosen, batch)
        params = chosen.params[chosen.reward.name]
        composed = chosen.reward.compose_rewards(unknown, params)
        if not torch.isfinite(composed).all():
            raise InputError(f"{where}: rewards is missing: one number a completion")
        if chosen.credit.by_correctness:
            raise InputError(f"{where}: rewards is missing; {chosen.credit.name} splits by it")


def _pad(rows: Sequence[Sequence[float]], mask: Tensor) -> Tensor:
    padded = torch.zeros(mask.shape, dtype=torch.float64)
    padded[mask] = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
    return padded


def _ragged(values: Tensor, mask: Tensor) -> list[list[float]]:
    values = masked.fill(values, mask)
    values = values + 0.0 if values.is_floating_point() else values  # no -0.0
    return [row[chosen].tolist() for row, chosen in zip(values, mask, strict=True)]


def _json(value: Any) -> Any:
    """`value` with infinities as text, which JSON has no number for."""
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every number in a JSON value, with where it stands: `advantages[0][2]`."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _numbers(item, f"{place}[{number}]")
    elif isinstance(value, (int, float)):
        yield place, value
