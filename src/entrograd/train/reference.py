"""The reference policy: a second model, never trained, whose log-probabilities of the sampled
tokens penalties and implicit rewards are measured against."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from entrograd.errors import InputError
from entrograd.methods.base import Recipe
from entrograd.models.forward import score
from entrograd.models.load import load_model
from entrograd.train.processes import ALONE, Processes, by_group
from entrograd.train.step import StepSettings

log = logging.getLogger("entrograd")


class Reference:
    """The model in folder `path`, scoring completions as the trainer's own forward does."""

    def __init__(self, path: str, policy: Any, dtype: str, settings: StepSettings) -> None:
        self.path, self.settings = path, settings
        self.model = load_model(path, dtype, str(policy.device))
        words, expected = (m.get_input_embeddings().num_embeddings for m in (self.model, policy))
        if words != expected:
            raise InputError(
                f"{path}: the reference model knows {words} tokens, the model in training "
                f"{expected}; give one with the same tokenizer"
            )
        self._compared = False

    def add_logprobs(self, rows: Sequence[dict[str, Any]], processes: Processes = ALONE) -> None:
        """Give each row its `ref_logprobs`: log pi_ref of every completion token, nats. Each of
        several processes has the same rows and computes its share of the groups."""
        groups = by_group([row for row in rows if row.get("ref_logprobs") is None])
        missing = [row for group in groups for row in group]
        mine = [row for group in processes.share(groups) for row in group]
        scored = score(
            self.model,
            [row["prompt_ids"] for row in mine],
            [row["completion_ids"] for row in mine],
            self.settings.temperature,
            self.settings.token_budget,
        )
        share = [
            {"prompt_id": row["prompt_id"], "ref_logprobs": logprobs.tolist()}
            for row, (logprobs, _) in zip(mine, scored, strict=True)
        ]
        for row, found in zip(missing, processes.gather_groups(share), strict=True):
            row["ref_logprobs"] = found["ref_logprobs"]
        if missing and not self._compared:
            self._compared = True
            if _largest_gap(missing) < 1e-3:
                log.warning(
                    "%s: the reference is the policy that sampled: KL starts at 0, and implicit "
                    "rewards (asr) are 0 at every token, which keeps none",
                    self.path,
                )


def load_reference(
    recipe: Recipe, path: str | None, policy: Any, dtype: str, settings: StepSettings
) -> Reference | None:
    """The reference model where `recipe` reads one; loaded on the policy's device."""
    if "ref_logprobs" not in recipe.required_columns:
        if path is not None:
            log.info("%s: not loaded, method %s reads no reference model", path, recipe.name)
        return None
    assert path is not None, "check_required_columns comes first"
    return Reference(path, policy, dtype, settings)


def _largest_gap(rows: Sequence[dict[str, Any]]) -> float:
    return max(
        abs(old - new)
        for row in rows
        for old, new in zip(row["old_logprobs"], row["ref_logprobs"], strict=True)
    )
