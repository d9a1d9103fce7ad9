"""What stage annotate reports of its table, and the alarms that reports raise."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from entrograd import io
from entrograd.errors import InputError
from entrograd.params import Alarms
from entrograd.verify.grade import STATUSES

log = logging.getLogger("entrograd")


def summarise(annotated: Sequence[Path], groups: Sequence[Path]) -> dict[str, Any]:
    """The numbers of results/annotate.json, from shards of both tables; entropies in nats.

    `groups_with_signal` is the share of groups whose rewards differ; `mean_token_entropy` is over
    all tokens, `mean_semantic_entropy` (rao) over groups.
    """
    counts = dict.fromkeys(STATUSES, 0)
    completions = signal = tokens = prompts = 0
    reward = entropy = semantic = 0.0
    for file in annotated:
        table = io.read_table(file, "annotated")
        completions += table.num_rows
        reward += pc.sum(table["reward"].cast("double")).as_py() or 0.0
        for status in table["reward_status"].to_pylist():
            counts[status] += 1
        values = pc.list_flatten(table["entropies"])
        tokens += len(values)
        entropy += pc.sum(values.cast("double")).as_py() or 0.0
        spread = table.group_by("prompt_id").aggregate([("reward", "min"), ("reward", "max")])
        signal += pc.sum(pc.not_equal(spread["reward_min"], spread["reward_max"])).as_py() or 0
    for file in groups:
        column = io.read_table(file, "groups")["semantic_entropy_rao"].cast("double")
        prompts += len(column)
        semantic += pc.sum(column).as_py() or 0.0
    return {
        "completions": completions,
        "groups": prompts,
        "mean_reward": reward / completions,
        "status": {status: count / completions for status, count in counts.items()},
        "groups_with_signal": signal / prompts,
        "mean_token_entropy": entropy / tokens,
        "mean_semantic_entropy": semantic / prompts,
    }


def check_alarms(summary: Mapping[str, Any], alarms: Alarms) -> None:
    """Warn, or stop with an InputError, where a share of `summary["status"]` exceeds its limit;
    warn of errors and where no group has a signal."""
    for status in ("no_answer", "truncated", "timeout"):
        share = summary["status"][status]
        stop, warn = getattr(alarms, f"{status}_stop"), getattr(alarms, f"{status}_warn")
        if stop is not None and share > stop:
            raise InputError(
                f"{share:.1%} of {summary['completions']} completions are {status}, more than "
                f"annotate.alarms.{status}_stop allows ({stop:.1%}); {_REMEDIES[status]}"
            )
        if share > warn:
            log.warning("%.1f%% of completions are %s; %s", share * 100, status, _REMEDIES[status])
    if summary["status"]["error"]:
        log.warning(
            "%.1f%% of completions could not be compared (reward 0); raise "
            "annotate.grader.memory_mb",
            summary["status"]["error"] * 100,
        )
    if not summary["groups_with_signal"]:
        log.warning(
            "no group has differing rewards (mean %.3f): training on these rollouts moves nothing; "
            "choose harder or easier prompts, or more completions a prompt",
            summary["mean_reward"],
        )


_REMEDIES = {
    "no_answer": "read some completion_text: does the prompt ask for an answer in a known form?",
    "truncated": "raise rollout.sampling.max_new_tokens or set stop strings",
    "timeout": "raise annotate.grader.timeout_seconds, or look at the answers of these rows",
}
