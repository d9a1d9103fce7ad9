"""What every method is and which columns it reads: for `entrograd methods`, and for messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from entrograd.methods.base import Recipe
from entrograd.methods.options import LossOptions
from entrograd.methods.params import CHOICES, MethodParams
from entrograd.methods.registry import METHODS, recipe


def methods_table() -> list[dict[str, Any]]:
    """name, paper, equation, needs and needs_with of every method, in the registry's order.

    `needs`: the columns read at its defaults; `needs_with`: those that it reads for the choice it
    is about with one parameter at another value, where that changes them, by `parameter=value`.
    """
    table = []
    for name, method in METHODS.items():
        defaults = method.params()
        own = method.reads(method.about, defaults)
        others = {
            setting: method.reads(method.about, params) for setting, params in _variants(defaults)
        }
        table.append(
            {
                "name": name,
                "paper": method.paper,
                "equation": method.equation,
                "needs": sorted(recipe(MethodParams(name=name)).required_columns),
                "needs_with": {key: sorted(found) for key, found in others.items() if found != own},
            }
        )
    return table


def _variants(defaults: Any) -> Iterator[tuple[str, Any]]:
    """`parameter=value` and the params with it, for each value of those that name one of several
    ways, and for weights; not for the options that every loss has."""
    shared = {item.name for item in dataclasses.fields(LossOptions)}
    for name, hint in get_type_hints(type(defaults)).items():
        if get_origin(hint) is Literal and name not in shared:
            for value in get_args(hint):
                yield f"{name}={value}", _changed(defaults, name, value)
        elif get_origin(hint) is dict:
            yield f'{name}={{"HEAD": 1}}', _changed(defaults, name, {"HEAD": 1.0})


def _changed(params: Any, name: str, value: Any) -> Any:
    """`params` with another value of one of them; as they are where that alone is not allowed."""
    try:
        return dataclasses.replace(params, **{name: value})
    except ValueError:
        return params


def reader(chosen: Recipe, need: str) -> str:
    """Who reads a column: METHOD.parameter=value where that setting asks for it, else METHOD."""
    for choice in CHOICES:
        method = getattr(chosen, choice)
        params = chosen.params[method.name]
        if need not in method.reads(choice, params):
            continue
        for name, default in vars(method.params()).items():
            if need not in method.reads(choice, _changed(params, name, default)):
                return f"{method.name}.{name}={getattr(params, name)}"
        return str(method.name)
    return chosen.name
