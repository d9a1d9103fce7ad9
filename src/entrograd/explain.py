"""What a method does to one group, from a JSON file: for learning a method by hand.

The file holds `rewards` [G] and, as the method needs, `entropies`, `logprobs`, `old_logprobs`,
`ref_logprobs`, `sampling_logprobs`, `token_scores` (a list a completion, a number a token),
`answers` (text or a number, null for none) and `reward_heads` ({name: [G numbers]}, or a list of
numbers a completion). Without any token list a completion counts as one token, or as many as
`lengths` says. `max_length` is Dr.GRPO's constant; the longest completion if absent.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entrograd import io
from entrograd.errors import InputError
from entrograd.methods import METHODS, recipe
from entrograd.methods.base import CHOICES, TOKEN_COLUMNS, Batch, Recipe, denominators
from entrograd.methods.diagnostics import diagnostics
from entrograd.numerics import masked
from entrograd.numerics.ratings import rating_entropy
from entrograd.params import MethodParams, check

TOKEN_KEYS = ("logprobs", *TOKEN_COLUMNS)
KEYS = ("rewards", "answers", "reward_heads", "lengths", "max_length", *TOKEN_KEYS)
# A method names its needs as the annotated table does; here clusters come from the answers.
SOURCES = {"cluster_id": "answers"}


def explain(method: str, group_file: Path | str, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The advantages, loss and diagnostics of one group, as JSON values.

    Args:
        method: a name of METHODS.
        group_file: the group, as above.
        settings: key=value; a key is a parameter of `method`, OTHER.parameter of another one, or
            one of the choices reward, credit, modulation, loss (the value names a method).

    Returns:
        `method`, `choices`, `params`, `rewards` (composed), `working` (what its choices compute on
        the way), `advantages` (ragged), `token_losses` and `loss` where logprobs are given,
        `diagnostics`. Without token lists a completion's tokens are equal and one stands for all.

    Raises:
        InputError: names the file and key, or the setting.
    """
    data = read_group(group_file)
    try:
        chosen = recipe(check(MethodParams, _section(method, settings), "method"))
    except InputError as error:
        raise InputError(str(error).replace("params.yaml: method.", "--set ")) from None
    _check_needs(chosen, data, str(group_file))
    batch, logprobs = make_batch(data, str(group_file))
    chosen = _fitted(chosen, batch)
    advantages = chosen.advantages(batch)
    shown = batch.completion_mask
    if not set(TOKEN_KEYS) & set(data):
        shown = shown & (torch.arange(shown.shape[1]) == 0)
    composed = chosen.reward.compose_rewards(batch, chosen.params[chosen.reward.name])
    answer: dict[str, Any] = {
        "method": method,
        "choices": {choice: getattr(chosen, choice).name for choice in CHOICES},
        "params": _json(dataclasses.asdict(chosen.params[method])),
        "rewards": composed.tolist(),
    }
    others = {getattr(chosen, choice).name for choice in CHOICES} - {method}
    for name in sorted(others):
        parameters = _json(dataclasses.asdict(chosen.params[name]))
        answer.setdefault("other_params", {})[name] = parameters
    if working := _working(chosen, dataclasses.replace(batch, rewards=composed), shown):
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
    answer["diagnostics"] = diagnostics(chosen, batch, current, advantages)
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


def methods_table() -> list[dict[str, Any]]:
    """name, paper, equation and needs of every method, in the registry's order."""
    return [
        {
            "name": method.name,
            "paper": method.paper,
            "equation": method.equation,
            "needs": sorted(method.needs),
        }
        for method in METHODS.values()
    ]


def read_group(path: Path | str) -> dict[str, Any]:
    """The checked content of a group file; InputError names the file, the key and the remedy."""
    data = io.read_json(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected an object with {', '.join(KEYS)}")
    for key in data:
        if key not in KEYS:
            raise InputError(f"{path}: {key}: unknown key; allowed here: {', '.join(KEYS)}")
    data = {**data, "reward_heads": _name_heads(path, data.get("reward_heads", {}))}
    lists = {key: data[key] for key in ("rewards", "answers", *TOKEN_KEYS) if key in data}
    if "lengths" in data:
        lists["lengths"] = data["lengths"]
    lists |= {f"reward_heads.{name}": values for name, values in data["reward_heads"].items()}
    for key, value in lists.items():
        if not isinstance(value, list) or not value:
            raise InputError(f"{path}: {key}: expected a list with an entry a completion")
    sizes = {key: len(value) for key, value in lists.items()}
    if not sizes or len(set(sizes.values())) > 1:
        raise InputError(f"{path}: the lists must hold one entry a completion, got {sizes}")
    for key, value in lists.items():
        if key in TOKEN_KEYS:
            _check_tokens(path, key, value)
        elif key == "answers":
            if not all(item is None or isinstance(item, (str, int, float)) for item in value):
                raise InputError(f"{path}: answers: expected text, or null where there is none")
            data["answers"] = [None if item is None else str(item) for item in value]
        else:
            _check_numbers(path, key, value)
    lengths = {key: [len(row) for row in lists[key]] for key in TOKEN_KEYS if key in lists}
    if len({tuple(value) for value in lengths.values()}) > 1:
        raise InputError(f"{path}: the token lists differ in length: {lengths}")
    if lengths and "lengths" in data:
        raise InputError(f"{path}: lengths: the token lists have theirs; drop lengths")
    for key in ("max_length", "lengths"):
        for length in lists.get(key, [data[key]] if key in data else []):
            if type(length) is not int or length < 1:
                raise InputError(f"{path}: {key}: expected a whole number above 0 (got {length!r})")
    return data


def make_batch(data: Mapping[str, Any], where: str) -> tuple[Batch, Tensor | None]:
    """The Batch of one group in float64, and its logprobs where the file has them."""
    tokens = {key: data[key] for key in TOKEN_KEYS if key in data}
    heads = data["reward_heads"]
    lists = [*tokens.values(), *heads.values()]
    lists += [data[key] for key in ("rewards", "answers") if key in data]
    size = len(lists[0])
    lengths = [len(row) for row in next(iter(tokens.values()), ())]
    lengths = lengths or data.get("lengths") or [1] * size
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    padded = {key: _pad(value, mask) for key, value in tokens.items()}
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
    section: dict[str, Any] = {"name": method}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: expected key=value")
        block, dot, name = key.rpartition(".")
        if not dot and key in CHOICES:
            section[key] = text
        else:
            section.setdefault(block or method, {})[name] = _value(text)
    return section


def _value(text: str) -> Any:
    """A number, true, false, null or a JSON value where it reads as one, else text."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return float(text)  # inf, .5
    except ValueError:
        return text


def _check_needs(chosen: Recipe, data: Mapping[str, Any], where: str) -> None:
    for need in sorted(chosen.needs):
        key = SOURCES.get(need, need)
        if not data.get(key):
            raise InputError(f"{where}: {key} is missing; {chosen.name} reads it")
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


def _name_heads(path: Path | str, heads: Any) -> dict[str, Any]:
    """{name: [G]} from that or from one list of numbers a completion, named head_0 and on."""
    if isinstance(heads, dict):
        return heads
    rows = heads if isinstance(heads, list) else [heads]
    if not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
        raise InputError(
            f"{path}: reward_heads: expected {{name: [a number a completion]}} or lists of one "
            "length, one a completion"
        )
    return {f"head_{k}": list(column) for k, column in enumerate(zip(*rows, strict=True))}


def _check_tokens(path: Path | str, key: str, rows: list[Any]) -> None:
    for number, row in enumerate(rows):
        if not isinstance(row, list) or not row:
            raise InputError(f"{path}: {key}[{number}]: expected a list with a number a token")
        _check_numbers(path, f"{key}[{number}]", row)


def _check_numbers(path: Path | str, key: str, values: list[Any]) -> None:
    for place, value in enumerate(values):
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value):
            raise InputError(f"{path}: {key}[{place}]: expected a finite number (got {value!r})")


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
