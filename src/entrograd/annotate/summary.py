"""What stage annotate reports of its table, and the alarms that reports raise."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import pyarrow as pa
import pyarrow.compute as pc

from entrograd.annotate.groups import GroupStatistics
from entrograd.annotate.params import Alarms
from entrograd.data.groups import PromptGroup, table_of
from entrograd.errors import InputError
from entrograd.rewards.verify.grade import STATUSES
from entrograd.storage.schemas import SCHEMAS
from entrograd.storage.tables import read_table

log = logging.getLogger("entrograd")

WATCHED = ("no_answer", "truncated", "timeout")  # statuses whose fractions raise alarms


class Summary(TypedDict):
    """The numbers of results/annotate.json; entropies in nats."""

    completions: int
    groups: int
    mean_reward: float
    status: dict[str, float]  # the fraction of completions with each reward status
    groups_with_signal: float  # the fraction of groups whose rewards differ
    mean_token_entropy: float  # over all tokens
    mean_semantic_entropy: float  # estimator rao, over groups


def summarise(annotated: Sequence[Path], groups: Sequence[Path]) -> Summary:
    """The summary of shards of both tables."""
    return _summarise(
        (read_table(file, "annotated") for file in annotated),
        (read_table(file, "groups") for file in groups),
    )


def summarise_groups(
    groups: Sequence[PromptGroup], statistics: Sequence[GroupStatistics]
) -> Summary:
    """The summary of groups in memory, at least one."""
    entropies = [each.semantic_entropy_rao for each in statistics]
    column = SCHEMAS["groups"].field("semantic_entropy_rao")
    of_groups = pa.table([pa.array(entropies, column.type)], names=[column.name])
    return _summarise([table_of(groups, "annotated")], [of_groups])


def _summarise(annotated: Iterable[pa.Table], groups: Iterable[pa.Table]) -> Summary:
    counts = dict.fromkeys(STATUSES, 0)
    completions = signal = tokens = prompts = 0
    reward = entropy = semantic = 0.0
    for table in annotated:
        completions += table.num_rows
        reward += pc.sum(table["reward"].cast("double")).as_py() or 0.0
        for status in table["reward_status"].to_pylist():
            counts[status] += 1
        values = pc.list_flatten(table["entropies"])
        tokens += len(values)
        entropy += pc.sum(values.cast("double")).as_py() or 0.0
        spread = table.group_by("prompt_id").aggregate([("reward", "min"), ("reward", "max")])
        signal += pc.sum(pc.not_equal(spread["reward_min"], spread["reward_max"])).as_py() or 0
    for table in groups:
        column = table["semantic_entropy_rao"].cast("double")
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


def check_alarms(summary: Summary, alarms: Alarms, where: str = "") -> int:
    """How many alarms a summary raises: each is a warning, or, past its `_stop`, an InputError.

    `where` names the round. Beside the thresholds, that some comparison failed is one.
    """
    place = f"{where}: " if where else ""
    count = 0
    for name, value, sign, text in _alarms(summary):
        stop, warn = getattr(alarms, f"{name}_stop"), getattr(alarms, f"{name}_warn")
        if stop is not None and sign * value > sign * stop:
            limit = f"{stop:.1%}" if sign > 0 else f"{stop} nats"
            raise InputError(
                f"{place}{text}, {'more' if sign > 0 else 'less'} than annotate.alarms.{name}_stop "
                f"allows ({limit}); {_REMEDIES[name]}"
            )
        if sign * value > sign * warn:
            count += 1
            log.warning("%s%s; %s", place, text, _REMEDIES[name])
    if error := summary["status"]["error"]:
        count += 1
        log.warning(
            "%s%.1f%% of completions could not be compared (reward 0); raise "
            "annotate.grader.memory_mb",
            place,
            error * 100,
        )
    return count


def _alarms(summary: Summary) -> Iterator[tuple[str, float, int, str]]:
    """Of each alarm: its name, the value it watches, 1 where that may be too large (-1: too small),
    and the value in words."""
    of = f"of {summary['completions']} completions are"
    for status in WATCHED:
        fraction = summary["status"][status]
        yield status, fraction, 1, f"{fraction:.1%} {of} {status}"
    equal = 1 - summary["groups_with_signal"]
    mean = summary["mean_reward"]
    yield "no_signal", equal, 1, f"{equal:.1%} of groups have equal rewards (mean {mean:.3f})"
    entropy = summary["mean_token_entropy"]
    yield "entropy", entropy, -1, f"the mean token entropy is {entropy:.3g} nats"


_REMEDIES = {
    "no_answer": "read some completion_text: does the prompt ask for an answer in a known form?",
    "truncated": "raise rollout.sampling.max_new_tokens or set stop strings",
    "timeout": "raise annotate.grader.timeout_seconds, or look at the answers of these rows",
    "no_signal": "training on these moves nothing: choose harder or easier prompts, or more "
    "completions per prompt",
    "entropy": "the policy explores no more: lower the learning rate, or sample hotter",
}
