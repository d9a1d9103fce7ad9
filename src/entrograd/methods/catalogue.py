"""What there is: methods with their four components, and components with what they read. For
`entrograd methods`, and for messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

from entrograd.methods.components import KINDS, Component, PolicyLoss
from entrograd.methods.params import MethodParams
from entrograd.methods.presets import COMPONENTS, PRESETS
from entrograd.methods.recipe import Recipe
from entrograd.methods.registry import component, recipe


class MethodRow(NamedTuple):
    """A preset: the component it has for each choice, and the columns all of them read."""

    name: str
    components: dict[str, str]
    required_columns: list[str]


class ComponentRow(NamedTuple):
    """A component and the columns it reads at its defaults. `required_columns_with`: those it reads
    with one parameter at another value, if that changes them, by `parameter=value`."""

    choice: str
    name: str
    paper: str
    equation: str
    required_columns: list[str]
    required_columns_with: dict[str, list[str]]


def methods_table() -> list[MethodRow]:
    """Every method, in the order of PRESETS."""
    return [
        MethodRow(name, preset._asdict(), sorted(recipe(MethodParams(name=name)).required_columns))
        for name, preset in PRESETS.items()
    ]


def components_table() -> list[ComponentRow]:
    """Every component, in the order of COMPONENTS."""
    return [_row(component(kind, name)()) for kind in KINDS for name in COMPONENTS[kind.choice]]


def _row(part: Component) -> ComponentRow:
    own = part.required_columns
    others = {setting: changed.required_columns for setting, changed in _variants(part)}
    return ComponentRow(
        part.choice,
        part.name,
        part.paper,
        part.equation,
        sorted(own),
        {setting: sorted(columns) for setting, columns in others.items() if columns != own},
    )


def _variants(part: Component) -> Iterator[tuple[str, Component]]:
    """`parameter=value` and the component with it, for each value of those that name one of several
    ways, and for weights; not for the options that every loss has."""
    shared = {item.name for item in dataclasses.fields(PolicyLoss)}
    for name, hint in get_type_hints(type(part)).items():
        if get_origin(hint) is Literal and name not in shared:
            for value in get_args(hint):
                yield f"{name}={value}", _changed(part, name, value)
        elif get_origin(hint) is dict:
            yield f'{name}={{"HEAD": 1}}', _changed(part, name, {"HEAD": 1.0})


def _changed(part: Component, name: str, value: object) -> Component:
    """`part` with another value of one parameter; as it is if that alone is not allowed."""
    try:
        return dataclasses.replace(part, **{name: value})
    except ValueError:
        return part


def reader(chosen: Recipe, column: str) -> str:
    """Who reads a column: COMPONENT.parameter=value if that setting asks for it, else COMPONENT."""
    for part in chosen.components:
        if column not in part.required_columns:
            continue
        for name, default in vars(type(part)()).items():
            if column not in _changed(part, name, default).required_columns:
                return f"{part.name}.{name}={getattr(part, name)}"
        return part.name
    return chosen.name
