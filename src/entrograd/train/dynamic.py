"""Dynamic sampling (DAPO, arXiv 2503.14476, Eq. 11): a round's batch holds groups with signal."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from entrograd.data.groups import PromptGroup
from entrograd.methods.recipe import Recipe
from entrograd.train.batch import examples
from entrograd.train.params import DynamicSampling

log = logging.getLogger("entrograd")


@dataclass(frozen=True)
class Filled:
    """The groups of a round, those left over for the next, the fraction of drawn groups with signal
    to plan the next round by, and what was measured for the curve."""

    groups: list[PromptGroup]
    surplus: list[PromptGroup]
    signal_fraction: float
    measured: dict[str, float]


def fill(
    wanted: int,
    carried: Sequence[PromptGroup],
    signal_fraction: float,
    draw: Callable[[int], list[PromptGroup]],
    signal: Callable[[list[PromptGroup]], list[bool]],
    params: DynamicSampling,
) -> Filled:
    """Draw until `wanted` groups have signal.

    Args:
        carried: groups left over by the round before, `wanted` at most: they come first.
        signal_fraction: of drawn groups, the fraction expected to have signal, above 0.
        draw: count -> that many new groups; fewer where no prompt is left.
        signal: groups -> whether each has signal.
        params: max_factor * wanted groups are drawn at most.

    The batch is smaller than `wanted` where that bound or the prompts are reached before; where no
    group at all has signal it is `wanted` groups without.
    """
    groups, without = list(carried), list[PromptGroup]()
    limit, drawn, rounds = math.floor(params.max_factor * wanted), 0, 0
    while len(groups) < wanted and drawn < limit:
        count = min(math.ceil((wanted - len(groups)) / signal_fraction), limit - drawn)
        new = draw(count)
        if not new:
            break
        good = signal(new)
        groups += [group for group, has in zip(new, good, strict=True) if has]
        without += [group for group, has in zip(new, good, strict=True) if not has]
        drawn, rounds = drawn + len(new), rounds + 1
        measured = sum(good) / len(good)
        signal_fraction = max(
            (1 - params.newest) * signal_fraction + params.newest * measured,
            1 / (params.max_factor * wanted),
        )
        if len(new) < count:
            break
    found = len(groups)
    if found < wanted:
        log.warning(
            "dynamic sampling: %d of %d groups with signal after %d prompts", found, wanted, drawn
        )
    return Filled(
        groups=groups[:wanted] or without[:wanted],
        surplus=groups[wanted:][:wanted],
        signal_fraction=signal_fraction,
        measured={
            "groups_drawn": float(drawn),
            "groups_carried": float(len(carried)),
            "signal_fraction": signal_fraction,
            "draws": float(rounds),
        },
    )


def has_signal(recipe: Recipe, groups: Sequence[PromptGroup], device: torch.device) -> list[bool]:
    """Whether any token of a group has an advantage under the recipe."""
    active = (recipe.advantages(examples(groups, device).batch) != 0).any(-1)
    return [bool(part.any()) for part in active.split([len(group) for group in groups])]
