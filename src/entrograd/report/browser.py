"""The page: one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from entrograd.errors import InputError
from entrograd.pipeline.sections import Params
from entrograd.report import curves, plots, provenance, samples, scores, settings, tables
from entrograd.storage.files import atomic_folder, read_json, write_text
from entrograd.storage.tables import read_table

BINS = 12
LONGEST_TEXT = 4000  # characters of a completion that are shown


@dataclass(frozen=True)
class Inputs:
    """The files the page is made from; None where a run has no such file."""

    summary: Path
    samples: Path
    benchmarks: Path | None = None
    offline_curve: Path | None = None
    online_curve: Path | None = None
    groups: Path | None = None
    prepare: Path | None = None
    annotate: Path | None = None
    reward_heads: Path | None = None

    @property
    def given(self) -> set[str]:
        """The names of those that are there."""
        return {name for name, path in vars(self).items() if path is not None}

    @property
    def paths(self) -> list[Path]:
        """Those that are there."""
        return [path for path in vars(self).values() if path is not None]


@dataclass(frozen=True)
class Figure:
    """A drawn figure; `label` describes it to those who cannot see it."""

    label: str
    svg: Markup


@dataclass(frozen=True)
class Block:
    """A table of counts (`first` heads its column of names) or a list of facts, with a title."""

    title: str
    first: str = ""
    table: tables.Counts | None = None
    facts: list[tuple[str, str]] = field(default_factory=list)


def report(run: Params, inputs: Inputs, out: Path) -> str:
    """Write folder `out` with index.html; returns the one-line result.

    `run` is what the inputs were made with. The bytes are a function of the arguments and the
    inputs' contents. Text a model wrote is escaped. InputError names the file that is not as its
    stage writes it.
    """
    page = render(run, inputs)
    with atomic_folder(out) as folder:
        write_text(folder / "index.html", page)
    return f"{out / 'index.html'}: {len(page.encode()) / 1000:.0f} kB, open it in any browser"


def render(run: Params, inputs: Inputs) -> str:
    """The page's HTML."""
    models, differences = scores.scores(read_json(inputs.summary), str(inputs.summary))
    compared = samples.compare(inputs.samples, [m.name for m in models], run.report.samples)
    annotate = _optional_json(inputs.annotate)
    curve_files = {"offline": inputs.offline_curve, "online": inputs.online_curve}
    logs = {name: tables.read_curve(path) for name, path in curve_files.items() if path}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        title=run.report.title,
        interval=f"{100 * run.score.confidence:g} % interval",
        models=models,
        colours={m.name: plots.colour(i) for i, m in enumerate(models)},
        differences=differences,
        accuracy=_figure(plots.accuracy(models), "accuracy", "Accuracy of each model")
        if models
        else None,
        topics=settings.topics(run, inputs.given, _notes(run, inputs, logs)),
        parameters=settings.whole(run, inputs.given),
        origins=provenance.origins(inputs.paths),
        benchmarks=_benchmarks(inputs.benchmarks),
        curves=_curves(logs),
        preparation=_preparation(_optional_json(inputs.prepare)),
        annotation=tables.facts({k: v for k, v in annotate.items() if k != "status"})
        + _heads(inputs.reward_heads),
        statuses=tables.status_fractions(annotate),
        groups=_group_figures(inputs.groups),
        samples=compared.shown,
        sample_counts=compared.counts,
        sample_models=compared.models,
        sample_colours={name: plots.colour(i) for i, name in enumerate(compared.models)},
        samples_on=compared.benchmark,
        compared=sum(compared.counts.values()),
        longest=LONGEST_TEXT,
    )


def _figure(spec: plots.Spec, name: str, label: str) -> Figure:
    # vl-convert escapes text itself, so the SVG is markup whatever the data are called.
    return Figure(label, Markup(plots.svg(spec, name)))


def _heads(path: Path | None) -> list[tuple[str, str]]:
    """Mean, entropy (nats) and ENCORE's weight of each reward head, at the tau it was stored for:
    training may use another."""
    stored = _optional_json(path)
    shown = {
        name: {
            "mean": head["mean"],
            "entropy": head["entropy"],
            f"weight at tau {stored['tau']:g}, natural logarithm": head["weight"],
        }
        for name, head in stored.get("heads", {}).items()
    }
    return tables.facts(shown, "head · ")


def _optional_json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected an object of names and numbers")
    return value


def _benchmarks(path: Path | None) -> list[scores.BenchmarkScores]:
    return scores.benchmark_scores(_optional_json(path), str(path))


def _notes(run: Params, inputs: Inputs, logs: Mapping[str, tables.Curve]) -> dict[str, str]:
    """What the files say, by topic of the run."""
    prepared = _optional_json(inputs.prepare).get("total") or {}
    drawn = _optional_json(inputs.annotate)
    weights = [f"{model} {hashed}" for model, hashed in samples.weights(inputs.samples).items()]
    counts = {
        f"{name.capitalize()} training": f"{len(set(columns[axis]))} {axis}s"
        for name, columns in logs.items()
        if (axis := tables.axis(columns))
    }
    return counts | {
        "Problems": tables.words(prepared, {"train": "to train on", "heldout": "held out"}),
        "Rollouts": tables.words(drawn, {"groups": "prompts", "completions": "completions"}),
        "Method": settings.recipe(run.method),
        "Evaluation": f"Weights: {', '.join(weights)}" if weights else "",
    }


def _curves(logs: Mapping[str, tables.Curve]) -> list[dict[str, object]]:
    """One entry per figure that any run has: its words and its drawings of those runs."""
    hues = {"offline": plots.colour(1), "online": plots.colour(2)}
    runs = [(name, hues[name], columns) for name, columns in logs.items()]
    found: list[dict[str, object]] = []
    for number, figure in enumerate(curves.FIGURES):
        drawings = []
        for run, hue, columns in runs:
            spec = curves.curve(figure, columns, run, hue)
            if spec is not None:
                drawings.append(_figure(spec, f"{run}-{number}", f"{figure.title}, {run} training"))
        if drawings:
            found.append({"title": figure.title, "explain": figure.explain, "figures": drawings})
    return found


def _preparation(prepare: dict[str, Any]) -> list[Block]:
    """What became of the sources' rows, why rows were turned away, and what overlapped."""
    sources = prepare.get("sources") or {}
    total = {"total": prepare["total"]} if "total" in prepare and len(sources) != 1 else {}
    overlap = (prepare.get("overlap") or {}).get("by_benchmark") or {}
    blocks = [
        Block("Rows of each source", "source", tables.counts(sources | total)),
        Block("Rows turned away", facts=tables.facts(prepare.get("reject_reasons") or {})),
        Block("Training problems removed for overlap", "with", tables.counts(overlap)),
    ]
    return [block for block in blocks if block.table or block.facts]


def _group_figures(path: Path | None) -> list[dict[str, object]]:
    if path is None:
        return []
    table = read_table(path, "groups")
    size = pc.max(table.column("completions")).as_py() or 0
    if size < 2:
        return []
    high = math.log(size)
    entropies = table.column("semantic_entropy_rao").to_pylist()
    rewards = table.column("mean_reward").to_pylist()
    bins = tables.reward_by_entropy(entropies, rewards, high, BINS)
    return [
        {
            "title": "How uncertain groups are",
            "explain": f"Semantic entropy (rao estimator) of {len(entropies)} groups: 0 where all "
            f"completions agree, ln {size} = {high:.2f} nats where all {size} differ.",
            "figure": _figure(
                plots.entropy_histogram(entropies, high, BINS),
                "entropy-histogram",
                "Histogram of the groups' semantic entropy",
            ),
        },
        {
            "title": "Uncertainty against reward",
            "explain": "Mean reward of the groups of each entropy; a larger point stands for more "
            "groups. A fall to the right means that disagreement marks what the model does not "
            "know.",
            "figure": _figure(
                plots.entropy_reward(bins, high),
                "entropy-reward",
                "Mean reward by semantic entropy",
            ),
        },
    ]
