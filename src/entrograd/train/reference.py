"""The reference policy: a second model, never trained, whose log-probabilities of the sampled
tokens penalties and implicit rewards are measured against."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from entrograd.data.groups import PromptGroup
from entrograd.errors import InputError
from entrograd.methods.recipe import Recipe
from entrograd.models.forward import score
from entrograd.models.load import load_model
from entrograd.train.forward_backward import StepSettings
from entrograd.train.processes import ALONE, Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("entrograd")


class Reference:
    """The model in folder `path`, scoring completions as the trainer's own forward does."""

    def __init__(
        self, path: str, policy: PreTrainedModel, dtype: str, settings: StepSettings
    ) -> None:
        self.path, self.settings = path, settings
        self.model = load_model(path, dtype, str(policy.device))
        words, expected = (m.get_input_embeddings().num_embeddings for m in (self.model, policy))
        if words != expected:
            raise InputError(
                f"{path}: the reference model knows {words} tokens, the model in training "
                f"{expected}; give one with the same tokenizer"
            )
        self._compared = False

    def add_logprobs(self, groups: Sequence[PromptGroup], processes: Processes = ALONE) -> None:
        """Give each completion its `ref_logprobs`: log pi_ref of every token, nats. Each of several
        processes has the same groups and computes its share of them."""
        missing = [g for g in groups if any("ref_logprobs" not in c.tokens for c in g.completions)]
        mine = processes.share(missing)
        scored = score(
            self.model,
            [group.prompt_ids for group in mine for _ in group.completions],
            [c.completion_ids for group in mine for c in group.completions],
            self.settings.temperature,
            self.settings.token_budget,
        )
        logprobs = (values for values, _ in scored)
        share = [list(islice(logprobs, len(group))) for group in mine]
        for group, found in zip(missing, processes.gather(share), strict=True):
            for completion, values in zip(group.completions, found, strict=True):
                completion.tokens["ref_logprobs"] = values
        if missing and not self._compared:
            self._compared = True
            if _largest_gap(missing) < 1e-3:
                log.warning(
                    "%s: the reference is the policy that sampled: KL starts at 0, and implicit "
                    "rewards (asr) are 0 at every token, which keeps none",
                    self.path,
                )


def load_reference(
    recipe: Recipe, path: str | None, policy: PreTrainedModel, dtype: str, settings: StepSettings
) -> Reference | None:
    """The reference model where `recipe` reads one; loaded on the policy's device."""
    if "ref_logprobs" not in recipe.required_columns:
        if path is not None:
            log.info("%s: not loaded, method %s reads no reference model", path, recipe.name)
        return None
    assert path is not None, "check_required_columns comes first"
    return Reference(path, policy, dtype, settings)


def _largest_gap(groups: Sequence[PromptGroup]) -> float:
    return max(
        float(np.abs(c.tokens["old_logprobs"] - c.tokens["ref_logprobs"]).max())
        for group in groups
        for c in group.completions
    )
