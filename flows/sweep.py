"""Methods x seeds as DVC experiments, one Prefect task each: `python -m flows.sweep --methods grpo
gtpo --seeds 1 2`.

Each runs in a temporary copy of the commit (`dvc exp run --temp`), so the checkout stays as it is.
The first one runs alone: what all share, from the base model to the annotated rollouts, is then in
DVC's cache and is computed once. A failed experiment stops none of the others.

Methods are compared as they are: a reward, advantage, weighting or loss that params.yaml puts in
the place of a method's own is set aside, but for those that --set names.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from flows import ROOT, dvc
from flows.pipeline import any_server, quiet
from flows.server import ServerError

# isort: split
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

METRICS = ("base.accuracy", "offline.accuracy", "online.accuracy", "online_minus_base.diff")
TIMEOUT_MINUTES = 24 * 60.0


class SweepError(Exception):
    """The checkout or the request does not allow the sweep; the message says what to do."""


@dataclass(frozen=True)
class Experiment:
    """A name and the parameters it sets, `key=value` as `dvc exp run -S` takes them."""

    name: str
    settings: tuple[str, ...]


def experiments(
    methods: Sequence[str],
    seeds: Sequence[int],
    settings: Sequence[str] = (),
    prefix: str = "sweep",
    seed_key: str = "train_online.seed",
    choices: Sequence[str] = (),
) -> list[Experiment]:
    """Every method with every seed, methods outermost; `settings` go to each of them. `choices` of
    section `method` that no setting names are the method's own.

    Raises SweepError for a name that git would not take.
    """
    chosen = []
    own_choices = [
        f"method.{choice}=null"
        for choice in choices
        if not any(setting.startswith(f"method.{choice}=") for setting in settings)
    ]
    for method, seed in itertools.product(dict.fromkeys(methods), dict.fromkeys(seeds)):
        name = f"{prefix}-{method}-{seed}"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise SweepError(f"{name}: letters, digits, - and _ make an experiment's name")
        own = (f"method.name={method}", *own_choices, f"{seed_key}={seed}", *settings)
        chosen.append(Experiment(name, own))
    return chosen


def choices() -> list[str]:
    """Those of a method's four components that params.yaml replaces."""
    section = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["method"]
    return [
        choice for choice in ("reward", "advantage", "weighting", "loss") if section.get(choice)
    ]


def check(chosen: Sequence[Experiment], replace: bool) -> str | None:
    """Make sure that the checkout can take the experiments; a note if it has uncommitted changes.

    With `replace`, experiments of these names are removed first. Raises SweepError if there is no
    commit, or an experiment exists and may not be replaced.
    """
    if _git("rev-parse", "--verify", "--quiet", "HEAD").returncode != 0:
        raise SweepError(
            f"{ROOT}: experiments start from a commit and there is none; git add and commit first"
        )
    listed = _git("for-each-ref", "--format=%(refname)", "refs/exps").stdout.split()
    names = {reference.rpartition("/")[2] for reference in listed}
    existing = [experiment.name for experiment in chosen if experiment.name in names]
    if existing and not replace:
        raise SweepError(
            f"{', '.join(existing)}: there already; choose another --prefix, or --replace them"
        )
    if existing:
        dvc.Project(ROOT).call("exp remove", ["exp", "remove", *existing])
    dirty = _git("status", "--porcelain", "--untracked-files=no").stdout.splitlines()
    if not dirty:
        return None
    files = ", ".join(line[3:] for line in dirty)
    return f"uncommitted changes take part in every experiment: {files}"


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@task(
    name="experiment",
    task_run_name="{experiment.name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    log_prints=False,
)
def run_experiment(project: dvc.Project, experiment: Experiment, timeout: float) -> None:
    """One experiment through `dvc exp run --temp`."""
    settings = [part for setting in experiment.settings for part in ("-S", setting)]
    log = get_run_logger()
    project.call(
        experiment.name,
        ["--wait-for-lock", "exp", "run", "--temp", "--name", experiment.name, *settings],
        timeout=timeout,
        emit=log.info,
    )
    log.info(f"{experiment.name}: done", extra={"outcome": True})


def sweep(
    chosen: Sequence[Experiment], jobs: int, timeout_minutes: float = TIMEOUT_MINUTES
) -> dict[str, str]:
    """Run the experiments, `jobs` at once after the first; the reasons of failed ones, by name."""
    runner: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=jobs)

    @flow(name="sweep", task_runner=runner, persist_result=False, validate_parameters=False)
    def run(names: list[str]) -> dict[str, str]:
        project = dvc.Project(ROOT)
        futures: dict[str, PrefectFuture[Any]] = {}
        try:
            for experiment in chosen:
                futures[experiment.name] = run_experiment.submit(
                    project=project,
                    experiment=experiment,
                    timeout=60 * timeout_minutes,
                    return_state=False,
                )
                if len(futures) == 1:
                    futures[experiment.name].wait()
            for future in futures.values():
                future.wait()
        except BaseException:
            project.stop()
            raise
        failed = {
            name: str(error)
            for name, future in futures.items()
            if isinstance(error := future.state.result(raise_on_failure=False), Exception)
        }
        create_table_artifact(
            key="experiments",
            table=[{"experiment": name, **metrics(name)} for name in names if name not in failed],
        )
        return failed

    return run([experiment.name for experiment in chosen])


def metrics(experiment: str) -> dict[str, object]:
    """An experiment's metrics by dotted name, as DVC has them; a file it lacks adds none."""
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        shown = repo.metrics.show(revs=[experiment], hide_workspace=True)
    files = (file for revision in shown.values() for file in revision.get("data", {}).values())
    return {key: value for file in files for key, value in _flat(file.get("data", {}))}


def _flat(nested: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def table(rows: Mapping[str, Mapping[str, object]], wanted: Sequence[str] = METRICS) -> str:
    """Experiments x metrics as aligned text; all metrics if none of `wanted` is there."""
    present = [key for key in wanted if any(key in row for row in rows.values())]
    columns = present or sorted({key for row in rows.values() for key in row})
    lines = [["experiment", *columns]]
    for name, row in rows.items():
        cells = (row.get(column, "-") for column in columns)
        lines.append([name, *(f"{x:.4g}" if isinstance(x, float) else str(x) for x in cells)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep and print its table; 0, 1 if an experiment failed, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m flows.sweep", description=__doc__)
    parser.add_argument("--methods", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, required=True, metavar="N")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="further params of every one"
    )
    parser.add_argument("--prefix", default="sweep", help="experiments are PREFIX-METHOD-SEED")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="at once (default: 1)")
    parser.add_argument("--replace", action="store_true", help="experiments of the same name")
    parser.add_argument("--metrics", nargs="+", default=METRICS, metavar="KEY")
    parser.add_argument("--verbose", action="store_true", help="show the stages' own output")
    arguments = parser.parse_args(argv)
    quiet(arguments.verbose)
    try:
        dvc.Project(ROOT).graph()
        if arguments.jobs < 1:
            raise SweepError(f"--jobs {arguments.jobs}: at least 1")
        chosen = experiments(
            arguments.methods, arguments.seeds, arguments.set, arguments.prefix, choices=choices()
        )
        note = check(chosen, arguments.replace)
        if note:
            print(f"sweep: {note}", file=sys.stderr)
        with any_server():
            failed = sweep(chosen, arguments.jobs)
    except (dvc.UnknownStage, SweepError) as error:
        print(f"sweep: error: {error}", file=sys.stderr)
        return 2
    except (dvc.DvcError, ServerError) as error:
        print(f"sweep: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sweep: interrupted; no experiment is left running", file=sys.stderr)
        return 130
    done = [experiment.name for experiment in chosen if experiment.name not in failed]
    if done:
        print(table({name: metrics(name) for name in done}, arguments.metrics))
    for reason in failed.values():
        print(f"sweep: error: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
