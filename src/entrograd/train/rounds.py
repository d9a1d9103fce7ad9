"""The data of online training: which prompts a round draws, and the rounds drawn, kept on disk."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np

from entrograd.data.groups import PromptGroup, groups_of, table_of
from entrograd.errors import InputError
from entrograd.storage import tables
from entrograd.storage.files import read_json, write_json
from entrograd.storage.hashing import text_hash
from entrograd.storage.tables import read_table, shard_name, write_table
from entrograd.train.params import TrainOnlineParams

log = logging.getLogger("entrograd")


class Position(TypedDict):
    """Where a prompt order stands; its size does not grow with the number of prompts."""

    permutations: int
    offset: int  # within the newest permutation
    skipped: list[int]


class PromptOrder(Iterator[list[int]]):
    """Indexes of each round's prompts: permutation after permutation, each prompt once in each,
    never the same prompt twice in a round. Prompts passed over because their round had them already
    come first in the next."""

    def __init__(self, prompts: int, per_round: int, seed: int) -> None:
        self.prompts, self.per_round, self.seed = prompts, min(per_round, prompts), seed
        self.restore({"permutations": 0, "offset": 0, "skipped": []})

    def __next__(self) -> list[int]:
        return self.take(self.per_round, set())

    def take(self, count: int, used: set[int]) -> list[int]:
        """The next `count` prompts that are not among those `used` in this round, which they then
        are; fewer where all are."""
        chosen: list[int] = []
        while len(chosen) < count and len(used) < self.prompts:
            following = self._following(used)
            used.add(following)
            chosen.append(following)
        return chosen

    def position(self) -> Position:
        """Where it stands, as JSON."""
        return {
            "permutations": self._permutations,
            "offset": self._offset,
            "skipped": list(self._skipped),
        }

    def restore(self, position: Position) -> None:
        """Go to a position: what follows is what followed then."""
        self._generator = np.random.Generator(np.random.Philox(key=self.seed))
        self._permutations, self._permutation = 0, np.empty(0, np.int64)
        while self._permutations < position["permutations"]:
            self._permute()
        self._offset: int = position["offset"]
        self._skipped: list[int] = list(position["skipped"])

    def _following(self, used: set[int]) -> int:
        """The next prompt that is not used; there is one."""
        for place, prompt in enumerate(self._skipped):
            if prompt not in used:
                return self._skipped.pop(place)
        while True:
            if self._offset == len(self._permutation):
                self._permute()
            prompt = int(self._permutation[self._offset])
            self._offset += 1
            if prompt not in used:
                return prompt
            self._skipped.append(prompt)

    def _permute(self) -> None:
        self._permutation, self._offset = self._generator.permutation(self.prompts), 0
        self._permutations += 1


class MiniBatches:
    """The groups of each update of a round: `online.epochs_per_round` passes over the round, each
    divided into mini-batches of as equal size as can be, of at most prompts_per_update groups.

    The number of updates is the same in each round, whatever number of groups it has; of a round
    with fewer groups than mini-batches some serve twice. The first pass goes through the groups in
    the round's order, later ones through a permutation that is a function of seed, round and pass.
    """

    def __init__(self, online: TrainOnlineParams, prompts: int) -> None:
        """`prompts`: how many training prompts there are."""
        self.seed = online.seed
        whole = min(online.prompts_per_round, prompts)
        self.per_pass = math.ceil(whole / (online.prompts_per_update or whole))
        self.updates = online.epochs_per_round * self.per_pass  # of a round
        # Groups of the first update of a whole round; None: all.
        self.first = math.ceil(whole / self.per_pass) if self.per_pass > 1 else None

    def epoch(self, part: int) -> int:
        """The pass over the round, from 1, that update `part` belongs to."""
        return part // self.per_pass + 1

    def __call__(self, groups: Sequence[PromptGroup], number: int, part: int) -> list[PromptGroup]:
        """The groups of update `part` of round `number`, both counted from 0."""
        epoch, place = divmod(part, self.per_pass)
        if self.per_pass == 1:
            return list(groups)
        order = np.arange(len(groups))
        if epoch:
            key = text_hash("pass", str(self.seed), str(number), str(epoch))[:15]
            order = np.random.Generator(np.random.Philox(key=int(key, 16))).permutation(order)
        parts = np.array_split(order, min(self.per_pass, len(groups)))
        return [groups[index] for index in parts[place % len(parts)]]


@dataclass(frozen=True)
class Round:
    """A round before its updates: annotated groups, what was measured on them for the curve, and
    the prompt order's position after the draw. With dynamic sampling also how many of its first
    groups the round before left, the groups it leaves itself, and the fraction of groups with
    signal."""

    groups: list[PromptGroup]
    measured: dict[str, float]
    order: Position
    carried: int = 0
    surplus: list[PromptGroup] = field(default_factory=list)
    signal_fraction: float = 1.0


class Rounds:
    """The rounds drawn so far, one shard of schema `annotated` each, in a folder that outlives the
    process: after a crash a round is read, not drawn again."""

    def __init__(self, folder: Path, provenance: Mapping[str, object]) -> None:
        self.folder, self.provenance = folder, provenance

    def read(self, number: int, policy_version: str | None) -> Round | None:
        """The stored round, None where it must be drawn: it is not there, not whole, or sampled
        by another policy than `policy_version`.

        With `policy_version` None the round is one that updates were made on already; where that
        is lost, InputError: it cannot be drawn again.
        """
        shard, found = self.folder / shard_name(number), None
        if self._state(number).exists():
            try:
                state = read_json(self._state(number))
                surplus = _read(self._surplus(number), "annotated") if state["surplus"] else []
                found = Round(_read(shard, "annotated"), **{**state, "surplus": surplus})
            except InputError as error:
                log.warning("%s", error)
        if policy_version is None:
            if found is None:
                raise InputError(
                    f"{shard}: lost, and updates were made on it; remove {self.folder} to start "
                    "anew"
                )
            return found
        if found and _all_by(policy_version, found.groups[found.carried :]):
            return found
        return None

    def write(self, number: int, drawn: Round) -> None:
        """Store a round. Train on what is read: a resumed run has nothing else."""
        self._state(number).unlink(missing_ok=True)
        self._write(self.folder / shard_name(number), drawn.groups, "annotated")
        if drawn.surplus:
            self._write(self._surplus(number), drawn.surplus, "annotated")
        write_json(
            self._state(number),
            {
                "measured": drawn.measured,
                "order": drawn.order,
                "carried": drawn.carried,
                "surplus": len(drawn.surplus),
                "signal_fraction": drawn.signal_fraction,
            },
        )

    def write_ahead(self, number: int, groups: Sequence[PromptGroup]) -> None:
        """Store the rollouts of a round that was drawn ahead."""
        self._write(self._ahead(number), groups, "rollouts")

    def read_ahead(self, number: int, policy_version: str) -> list[PromptGroup] | None:
        """The stored rollouts of a round; None where there are none by `policy_version`."""
        if not self._ahead(number).exists():
            return None
        try:
            groups = _read(self._ahead(number), "rollouts")
        except InputError as error:
            log.warning("%s", error)
            return None
        return groups if _all_by(policy_version, groups) else None

    def assemble(self, count: int, out: Path) -> None:
        """Make folder `out` of the first `count` rounds."""
        tables.assemble(self.folder, out, [shard_name(number) for number in range(count)])

    def _write(self, path: Path, groups: Sequence[PromptGroup], name: str) -> None:
        write_table(path, table_of(groups, name), name, **self.provenance)

    def _surplus(self, number: int) -> Path:
        return self.folder / f"surplus-{number:05d}.parquet"

    def _ahead(self, number: int) -> Path:
        return self.folder / f"ahead-{number:05d}.parquet"

    def _state(self, number: int) -> Path:
        return self.folder / shard_name(number).replace(".parquet", ".json")


def _read(path: Path, name: str) -> list[PromptGroup]:
    return groups_of(read_table(path, name), str(path))


def _all_by(policy_version: str, groups: Sequence[PromptGroup]) -> bool:
    """Whether this policy sampled all of them."""
    return all(c.policy_version == policy_version for group in groups for c in group.completions)


def round_seed(seed: int, number: int) -> int:
    """A seed per round, below 2**63, a function of the run's seed and the round alone."""
    return int(text_hash("round", str(seed), str(number))[:15], 16)
