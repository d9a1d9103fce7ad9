"""The data of online training: which prompts a round draws, and the rounds drawn, kept on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from entrograd.errors import InputError
from entrograd.storage import tables
from entrograd.storage.files import read_json, write_json
from entrograd.storage.hashing import text_hash
from entrograd.storage.tables import read_table, shard_name, write_table

log = logging.getLogger("entrograd")


class PromptOrder(Iterator[list[int]]):
    """Indexes of each round's prompts: permutation after permutation, each prompt once in each,
    never the same prompt twice in a round."""

    def __init__(self, prompts: int, per_round: int, seed: int) -> None:
        self.prompts, self.per_round, self.seed = prompts, min(per_round, prompts), seed
        self.restore({"permutations": 0, "waiting": []})

    def __next__(self) -> list[int]:
        return self.take(self.per_round, set())

    def take(self, count: int, used: set[int]) -> list[int]:
        """The next `count` prompts that are not among those `used` in this round, which they then
        are; fewer where all are."""
        chosen: list[int] = []
        while len(chosen) < count and len(used) < self.prompts:
            if used.issuperset(self._waiting):
                self._permute(self._waiting)
            following = next(i for i in self._waiting if i not in used)
            self._waiting.remove(following)
            used.add(following)
            chosen.append(following)
        return chosen

    def position(self) -> dict[str, Any]:
        """Where it stands, as JSON."""
        return {"permutations": self._permutations, "waiting": list(self._waiting)}

    def restore(self, position: dict[str, Any]) -> None:
        """Go to a position: what follows is what followed then."""
        self._generator = np.random.Generator(np.random.Philox(key=self.seed))
        self._permutations = 0
        while self._permutations < position["permutations"]:
            self._permute([])
        self._waiting: list[int] = list(position["waiting"])

    def _permute(self, first: list[int]) -> None:
        """Another permutation, behind the prompts of the last that wait on."""
        self._waiting = [*first, *self._generator.permutation(self.prompts).tolist()]
        self._permutations += 1


@dataclass(frozen=True)
class Round:
    """A round before its updates: annotated rows, what was measured on them for the curve, and
    the prompt order's position after the draw. With dynamic sampling also how many of its first
    rows the round before left, the rows it leaves itself, and the share of groups with signal."""

    rows: list[dict[str, Any]]
    measured: dict[str, float]
    order: dict[str, Any]
    carried: int = 0
    surplus: list[dict[str, Any]] = field(default_factory=list)
    share: float = 1.0


class Rounds:
    """The rounds drawn so far, one shard of `annotated` each, in a folder that outlives the
    process: after a crash a round is read, not drawn again."""

    def __init__(self, folder: Path, provenance: dict[str, Any]) -> None:
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
                rows = read_table(shard, "annotated").to_pylist()
                state = read_json(self._state(number))
                if state.pop("surplus"):
                    state["surplus"] = read_table(self._surplus(number), "annotated").to_pylist()
                found = Round(rows, **state)
            except InputError as error:
                log.warning("%s", error)
        if policy_version is None:
            if found is None:
                raise InputError(
                    f"{shard}: lost, and updates were made on it; remove {self.folder} to start "
                    "anew"
                )
            return found
        if found and all(
            row["policy_version"] == policy_version for row in found.rows[found.carried :]
        ):
            return found
        return None

    def write(self, number: int, drawn: Round) -> None:
        """Store a round. Train on what is read: a resumed run has nothing else."""
        self._state(number).unlink(missing_ok=True)
        write_table(self.folder / shard_name(number), drawn.rows, "annotated", **self.provenance)
        if drawn.surplus:
            write_table(self._surplus(number), drawn.surplus, "annotated", **self.provenance)
        write_json(
            self._state(number),
            {
                "measured": drawn.measured,
                "order": drawn.order,
                "carried": drawn.carried,
                "surplus": len(drawn.surplus),
                "share": drawn.share,
            },
        )

    def write_ahead(self, number: int, rows: list[dict[str, Any]]) -> None:
        """Store the rollouts of a round that was drawn ahead."""
        write_table(self._ahead(number), rows, "rollouts", **self.provenance)

    def read_ahead(self, number: int, policy_version: str) -> list[dict[str, Any]] | None:
        """The stored rollouts of a round; None where there are none by `policy_version`."""
        if not self._ahead(number).exists():
            return None
        try:
            rows: list[dict[str, Any]] = read_table(self._ahead(number), "rollouts").to_pylist()
        except InputError as error:
            log.warning("%s", error)
            return None
        return rows if all(row["policy_version"] == policy_version for row in rows) else None

    def assemble(self, count: int, out: Path) -> None:
        """Make folder `out` of the first `count` rounds."""
        tables.assemble(self.folder, out, [shard_name(number) for number in range(count)])

    def _surplus(self, number: int) -> Path:
        return self.folder / f"surplus-{number:05d}.parquet"

    def _ahead(self, number: int) -> Path:
        return self.folder / f"ahead-{number:05d}.parquet"

    def _state(self, number: int) -> Path:
        return self.folder / shard_name(number).replace(".parquet", ".json")


def round_seed(seed: int, number: int) -> int:
    """A seed a round, below 2**63, a function of the run's seed and the round alone."""
    return int(text_hash("round", str(seed), str(number))[:15], 16)
