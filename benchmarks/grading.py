"""Grading and clustering of groups of 8 against calling math-verify on all pairs in one process.

10,000 problems, no two alike, with their real accepted answers. Each group's completions hold that
answer in the forms models write, answers of other problems, numbers close by, and sometimes none.
The one side grades and clusters completions (extraction, canonical form, one worker); the other is
given the extracted answers, reads each once and calls math-verify on the 8 pairs with the accepted
answer and the 28 among themselves (both ways where the first is equal). The sides take turns; the
second is measured on every n-th group, after a few unmeasured ones (its parser is slow at first).
Seconds are of processor time of all processes, since a machine may have other work; those by the
clock stand beside them.

The results of both must be equal; a pair that they judge differently is written out.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from math_verify import parse, verify

from entrograd.annotate.clusters import Group, by_answer
from entrograd.rewards.params import GraderParams
from entrograd.rewards.verify.grade import Grader, Item
from entrograd.storage.files import read_json, write_json

SIZE, CHUNKS, WARM_UP = 8, 10, 50
UNFINISHED = "Let us begin by"
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
SUITE = ("aime24", "amc23", "math500", "minerva", "olympiadbench")


class Problem(NamedTuple):
    """A problem's accepted answers and the completions of its group."""

    source: str
    accepted: tuple[str, ...]
    completions: tuple[str, ...]


# --- the groups ------------------------------------------------------------------------------


def problems(data: Path, count: int) -> list[Problem]:
    """The real groups, the five benchmarks, GSM8K's and SVAMP's tests, GSM8K's training set."""
    rng = random.Random(0)
    found = [
        Problem("real", (row["answer"],), tuple(row["completions"]))
        for row in read(data / "rollouts" / "math_8_completions.jsonl")
    ]
    for folder, name in (
        *(("benchmarks", name) for name in (*SUITE, "gsm8k", "svamp")),
        ("train", "gsm8k"),
    ):
        rows = read(data / folder / f"{name}.jsonl")
        golds = [as_list(row["answer"]) for row in rows]
        source = "suite" if name in SUITE else "grade school"
        found += [Problem(source, gold, group(gold, golds, rng)) for gold in golds]
    chosen = found[:10_000]
    rng.shuffle(chosen)
    return chosen[:count]


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def as_list(answer: str | list[str]) -> tuple[str, ...]:
    return tuple(answer) if isinstance(answer, list) else (answer,)


def group(
    gold: tuple[str, ...], others: Sequence[tuple[str, ...]], rng: random.Random
) -> tuple[str, ...]:
    """Completions of one problem: some right, the wrong ones agreeing as wrong ones do."""
    accuracy = rng.random()
    wrong = [close_by(gold[0], rng) or rng.choice(others)[0] for _ in range(4)]
    texts = []
    for _ in range(SIZE):
        if rng.random() < 0.03:
            texts.append(UNFINISHED)
            continue
        right = rng.random() < accuracy
        answer = rng.choice(gold) if right else rng.choices(wrong, (8, 4, 2, 1))[0]
        texts.append(f"We compute step by step. So it is $\\boxed{{{form(answer, rng)}}}$.")
    return tuple(texts)


def close_by(answer: str, rng: random.Random) -> str | None:
    """A plain integer changed a little, half of the time."""
    if not re.fullmatch(r"-?[0-9]{1,9}", answer) or rng.random() < 0.5:
        return None
    return str(int(answer) + rng.choice([-10, -2, -1, 1, 2, 10]))


def form(answer: str, rng: random.Random) -> str:
    """The same answer as a model may write it."""
    bare = answer.strip("$") if answer.count("$") == 2 else answer
    forms = [
        bare,
        bare,
        bare,
        bare.replace("\\frac", "\\dfrac"),
        f"{bare} ",
        bare.replace(" ", "  "),
    ]
    if re.fullmatch(r"-?[0-9]+", bare):
        forms += [f"{bare}.0", f"x = {bare}", f"{bare}\\text{{ units}}", f"{int(bare):,}"]
    if fraction := re.fullmatch(r"(-?)\\frac\{([0-9]+)\}\{([0-9]+)\}", bare):
        sign, top, bottom = fraction.groups()
        forms += [f"{sign}{top}/{bottom}", f"{sign}\\frac{{{2 * int(top)}}}{{{2 * int(bottom)}}}"]
    if "\\left" in bare:
        forms.append(bare.replace("\\left", "").replace("\\right", ""))
    return rng.choice(forms)


# --- the sides -------------------------------------------------------------------------------


class Result(NamedTuple):
    """Rewards, and cluster ids numbered by first appearance, of one group."""

    rewards: tuple[bool, ...]
    clusters: tuple[int, ...]


def ours(grader: Grader, chosen: Sequence[Problem]) -> tuple[list[Result], list[list[str | None]]]:
    """Grade and cluster, as stage annotate does with `match: mathematical`; also the answers."""
    items = [
        Item(p.accepted, text, "length" if text == UNFINISHED else "stop")
        for p in chosen
        for text in p.completions
    ]
    grades = iter(grader.grade(items))
    graded = [[next(grades) for _ in p.completions] for p in chosen]
    answers = [[grade.answer for grade in row] for row in graded]
    groups = [Group("", p.completions, row) for p, row in zip(chosen, answers, strict=True)]
    found = [
        Result(tuple(grade.reward == 1 for grade in row), tuple(clustering.ids))
        for row, clustering in zip(graded, by_answer(groups, grader), strict=True)
    ]
    return found, answers


def all_pairs(accepted: Sequence[str], answers: Sequence[str | None]) -> Result:
    """math-verify, as its documentation has it, on every pair."""
    golds = [parse(f"\\boxed{{{text}}}") for text in accepted]
    read = [None if text is None else parse(f"\\boxed{{{text}}}") for text in answers]
    rewards = tuple(one is not None and any(verify(gold, one) for gold in golds) for one in read)
    parent = list(range(len(read)))
    for a, b in combinations(range(len(read)), 2):
        if read[a] is None or read[b] is None or not verify(read[a], read[b]):
            continue
        if verify(read[b], read[a]):
            old, new = parent[b], parent[a]
            parent = [new if p == old else p for p in parent]
    numbers: dict[int, int] = {}
    return Result(rewards, tuple(numbers.setdefault(p, len(numbers)) for p in parent))


# --- differences -----------------------------------------------------------------------------


def differing(
    grader: Grader, accepted: Sequence[str], answers: Sequence[str | None]
) -> list[tuple[str, str, bool]]:
    """The pairs of a group the sides judge differently: (one, other, what this project says)."""
    texts = list(dict.fromkeys(text for text in answers if text is not None))
    pairs = [(gold, text) for gold in accepted for text in texts]
    pairs += list(combinations(texts, 2))
    said = [o.value is True for o in grader.compare([((one,), other) for one, other in pairs])]
    found = []
    for (one, other), equal in zip(pairs, said, strict=True):
        theirs = verify(parse(f"\\boxed{{{one}}}"), parse(f"\\boxed{{{other}}}"))
        if theirs != equal:
            found.append((one, other, equal))
    return found


# --- measuring -------------------------------------------------------------------------------


class Seconds(NamedTuple):
    """processor: of this process and its descendants, ended ones too. clock: as they passed."""

    processor: float
    clock: float


def now() -> Seconds:
    """The seconds so far."""
    ticks = sum(descendants().values())
    return Seconds(ticks / os.sysconf("SC_CLK_TCK"), time.perf_counter())


def descendants() -> dict[int, int]:
    """This process, its workers and their forks: pid -> clock ticks, ended children's too."""
    stats = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(") ")[2].split()
        except OSError:  # it has ended
            continue
        stats[int(file.parent.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    mine = {os.getpid()}
    for _ in range(3):
        mine |= {pid for pid, (parent, _) in stats.items() if parent in mine}
    return {pid: stats[pid][1] for pid in mine}


def since(start: Seconds, seconds: dict[str, float], side: str) -> float:
    """Add the seconds since `start` to those of a side; the processor's."""
    end = now()
    seconds[f"{side}_processor"] += end.processor - start.processor
    seconds[f"{side}_clock"] += end.clock - start.clock
    return end.processor - start.processor


def measure(count: int, every: int, data: Path) -> dict[str, Any]:
    """Both sides in turns; all numbers of this benchmark."""
    chosen = problems(data, count)
    step = -(-len(chosen) // CHUNKS)
    seconds: dict[str, float] = Counter()  # type: ignore[assignment]
    by_source: dict[str, list[float]] = {}
    sampled = different = 0
    pairs: Counter[tuple[str, str, bool]] = Counter()
    with Grader(GraderParams(workers=1)) as grader:
        for start in range(0, len(chosen), step):
            part = chosen[start : start + step]
            before = now()
            results, answers = ours(grader, part)
            since(before, seconds, "ours")
            if start == 0:
                for problem, row in list(zip(part, answers, strict=True))[1 : 1 + WARM_UP]:
                    all_pairs(problem.accepted, row)
            for index in range(0, len(part), every):
                before = now()
                theirs = all_pairs(part[index].accepted, answers[index])
                by_source.setdefault(part[index].source, []).append(
                    since(before, seconds, "all_pairs")
                )
                sampled += 1
                if theirs != results[index]:
                    different += 1
                    found = differing(grader, part[index].accepted, answers[index])
                    pairs.update(found or [("", "", False)])
            print(f"{start + len(part):6} groups", flush=True)
    a_group = {
        name: 1e3 * spent / (len(chosen) if name.startswith("ours") else sampled)
        for name, spent in seconds.items()
    }
    return {
        "groups": len(chosen),
        "sampled_groups": sampled,
        "milliseconds_a_group": a_group,
        "all_pairs_by_source": {
            name: {"groups": len(times), "processor_ms": 1e3 * sum(times) / len(times)}
            for name, times in sorted(by_source.items())
        },
        "groups_with_a_difference": different,
        "differing_pairs": [[*pair, number] for pair, number in sorted(pairs.items())],
        "math_verify": version("math-verify"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "ratio_clock": a_group["all_pairs_clock"] / a_group["ours_clock"],
        "ratio": a_group["all_pairs_processor"] / a_group["ours_processor"],
    }


def main() -> int:
    """Run, print, add to the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=10_000, help="groups (%(default)s)")
    parser.add_argument(
        "--every", type=int, default=20, help="all pairs on every n-th (%(default)s)"
    )
    parser.add_argument("--data", type=Path, default=SHARED, help="folder of the shared data")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/annotate.json"))
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # math-verify reports each of its timeouts
    found = measure(options.groups, options.every, options.data)
    print(json.dumps(found, indent=2, ensure_ascii=False))
    ratio = found.pop("ratio")
    written = read_json(options.out) if options.out.exists() else {}
    write_json(options.out, written | {"ratio_grading": ratio, "grading": found})
    different = found["groups_with_a_difference"]
    print(
        f"ratio_grading {ratio:.1f} ({found['ratio_clock']:.1f} by the clock), differ: {different}"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
