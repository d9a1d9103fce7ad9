"""Accuracies of models from their stored samples, with intervals and differences."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from entrograd.errors import InputError
from entrograd.evaluate.estimators import (
    Interval,
    all_alike,
    average_at_n,
    paired_difference,
    problem_means,
    wilson,
)
from entrograd.evaluate.params import HELDOUT, ScoreParams
from entrograd.storage.files import write_json
from entrograd.storage.tables import Provenance, provenance, read_table, shard_files

log = logging.getLogger("entrograd")

# What the metadata of a shard says of its benchmark, equal for all models: which problems, how
# completions were drawn, how they were graded.
SETTING = (
    *("list_sha256", "problems", "prompt", "n", "sampling", "seed", "dtype"),
    *("grader", "extraction"),
)
MODEL = ("model", "benchmark", "policy_version", "chat_template_sha256")  # and of the shard itself


@dataclass(frozen=True)
class Shard:
    """The samples of one model on one benchmark. `rewards`: those of each problem's samples by
    problem id, problems in the list's order; `statuses`: how often each reward status occurs."""

    file: Path
    origin: Provenance
    rewards: Mapping[str, Sequence[float]]
    statuses: Mapping[str, int]


def score(section: ScoreParams, samples: Path, summary: Path, benchmarks: Path) -> str:
    """Score every model on every benchmark; returns the one-line result.

    Args:
        samples: the folder of shards that stage evaluate wrote, one per model and benchmark. The
            model of the first is the one that the others' differences are taken from.
        summary: JSON to write: the held-out scores by model, `X_minus_FIRST` the differences.
        benchmarks: JSON to write: the same per benchmark, and all it takes to get them again.

    Raises InputError where there are no shards, where one has no metadata or other rows than it
    says, and where models were not evaluated on the same problems in the same way.
    """
    tasks = _tasks(samples)
    held = tasks.get(HELDOUT)
    write_json(summary, _summary(section, held) if held else {})
    named = {name: models for name, models in tasks.items() if name != HELDOUT}
    write_json(benchmarks, {name: _benchmark(section, models) for name, models in named.items()})
    first = HELDOUT if held else next(iter(tasks))
    scores = (
        f"{model} {100 * accuracy(section, shard).value:.1f} %"
        for model, shard in tasks[first].items()
    )
    problems = next(iter(tasks[first].values())).origin["problems"]
    more = f", and {len(tasks) - 1} more" if len(tasks) > 1 else ""
    return f"{first}, {problems} problems: {', '.join(scores)}{more}"


def accuracy(section: ScoreParams, shard: Shard) -> Interval:
    """A model's accuracy on a benchmark: Wilson for greedy completions, else avg@n."""
    rewards = list(shard.rewards.values())
    if shard.origin["sampling"]["temperature"] == 0:
        correct = sum(samples[0] >= 1 for samples in rewards)
        return wilson(correct, len(rewards), section.confidence)
    return average_at_n(rewards, section.bootstrap, section.confidence, section.seed)


# --- reading ---------------------------------------------------------------------------------


def _tasks(samples: Path) -> dict[str, dict[str, Shard]]:
    """The shards by benchmark and model, both in the shards' order; InputError where the models of
    a benchmark cannot be compared."""
    shards = [_shard(file) for file in shard_files(samples)]
    if not shards:
        raise InputError(f"{samples}: no shards; run stage evaluate again")
    found: dict[tuple[str, str], Shard] = {}
    for shard in shards:
        key = shard.origin["benchmark"], shard.origin["model"]
        if key in found:
            raise InputError(
                f"{shard.file}: model {key[1]} on {key[0]}, as {found[key].file.name}; remove one "
                "of the two"
            )
        found[key] = shard
    models = dict.fromkeys(model for _, model in found)
    tasks: dict[str, dict[str, Shard]] = {name: {} for name, _ in found}
    for name, of_task in tasks.items():
        for model in models:
            if (name, model) not in found:
                raise InputError(
                    f"{samples}: no shard of model {model} on {name}; run stage evaluate for all "
                    "models together"
                )
            of_task[model] = found[name, model]
        first, *others = of_task.values()
        for other in others:
            _check_comparable(first, other)
    return tasks


def _shard(file: Path) -> Shard:
    """A file of samples; InputError where its metadata is not there, or tells of other rows."""
    table = read_table(file, "samples")
    origin = provenance(file)
    absent = [key for key in (*MODEL, *SETTING) if key not in origin]
    if absent:
        raise InputError(
            f"{file}: its metadata lacks {', '.join(absent)}; run stage evaluate again"
        )
    rewards: dict[str, list[float]] = {}
    columns = ("problem_id", "reward")
    for problem, reward in zip(*(table.column(name).to_pylist() for name in columns), strict=True):
        rewards.setdefault(problem, []).append(reward)
    named = all(
        table.column(key).unique().to_pylist() == [origin[key]] for key in ("model", "benchmark")
    )
    sizes = {len(of_problem) for of_problem in rewards.values()}
    if not named or len(rewards) != origin["problems"] or sizes != {origin["n"]}:
        raise InputError(
            f"{file}: its rows are not what its metadata says, {origin['n']} samples of each of "
            f"{origin['problems']} problems by {origin['model']} on {origin['benchmark']}; run "
            "stage evaluate again"
        )
    return Shard(file, origin, rewards, Counter(table.column("reward_status").to_pylist()))


def _check_comparable(first: Shard, other: Shard) -> None:
    """InputError where two models were not asked the same problems in the same way."""
    one: Mapping[str, object] = first.origin
    two: Mapping[str, object] = other.origin
    remedy = "run stage evaluate for all models together"
    for key in SETTING:
        if one[key] != two[key]:
            raise InputError(
                f"{other.file}: {key} of {two['benchmark']} is {two[key]}, in {first.file.name} "
                f"it is {one[key]}; {remedy}"
            )
    if differing := sorted(first.rewards.keys() ^ other.rewards.keys()):
        raise InputError(
            f"{other.file}: other problems of {two['benchmark']} than in {first.file.name} "
            f"({differing[0]} is in one of them alone); {remedy}"
        )


# --- results ---------------------------------------------------------------------------------


def _summary(section: ScoreParams, models: Mapping[str, Shard]) -> dict[str, object]:
    accuracies = {
        name: {"n": shard.origin["problems"], **_accuracy(accuracy(section, shard))}
        for name, shard in models.items()
    }
    return {**accuracies, **_differences(section, models)}


def _benchmark(section: ScoreParams, models: Mapping[str, Shard]) -> dict[str, object]:
    """A benchmark's entry: every model's score, and all it takes to get it again: what was asked
    of which weights, and how it was sampled, graded and scored."""
    origin = next(iter(models.values())).origin
    setting = {key: value for key, value in origin.items() if key in SETTING}
    del setting["sampling"]
    return {
        **setting,
        **origin["sampling"],
        "bootstrap": section.bootstrap,
        "confidence": section.confidence,
        "models": {
            name: {
                **_accuracy(accuracy(section, shard)),
                "reward_status": shard.statuses,
                "policy_version": shard.origin["policy_version"],
                "chat_template_sha256": shard.origin["chat_template_sha256"],
            }
            for name, shard in models.items()
        },
        "differences": _differences(section, models),
    }


def _accuracy(interval: Interval) -> dict[str, float]:
    return {"accuracy": interval.value, "ci_low": interval.low, "ci_high": interval.high}


def _differences(section: ScoreParams, models: Mapping[str, Shard]) -> dict[str, dict[str, float]]:
    """`X_minus_FIRST` for every model but the first, problem by problem."""
    (first, base), *others = models.items()
    before, found = problem_means(list(base.rewards.values())), {}
    for name, shard in others:
        after = problem_means([shard.rewards[problem] for problem in base.rewards])
        if all_alike(before, after):
            log.warning(
                "%s - %s on %s: all %d differences are equal, so the bootstrap interval of their "
                "mean has no width and says nothing; evaluate more or harder problems",
                *(name, first, shard.origin["benchmark"], len(before)),
            )
        interval = paired_difference(
            before, after, section.bootstrap, section.confidence, section.seed
        )
        found[f"{name}_minus_{first}"] = {
            "diff": interval.value,
            "ci_low": interval.low,
            "ci_high": interval.high,
        }
    return found
