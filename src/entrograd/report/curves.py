"""Training curves: which metrics are drawn together, and how; their words are the registry's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from entrograd.report.plots import Spec
from entrograd.report.tables import axis, rolling_mean
from entrograd.storage.metrics import Metric, metric

SECONDARY = ("#c99a2e", "#b4541a")  # further lines of one figure
SMOOTH_FROM = 20  # points from which a curve is drawn smoothed, the raw values behind it


@dataclass(frozen=True)
class Figure:
    """A figure of training: the metrics it draws, all of one unit; the first says which rows."""

    title: str
    columns: tuple[str, ...]

    @property
    def metrics(self) -> list[Metric]:
        """What the registry says of each column."""
        return [metric(name) for name in self.columns]

    @property
    def unit(self) -> str:
        """Of the vertical axis."""
        return self.metrics[0].unit

    @property
    def explain(self) -> str:
        """What is drawn, in sentences."""
        return " ".join(one.meaning for one in self.metrics)


FIGURES = (
    Figure("Mean reward", ("reward_mean",)),
    Figure("Held-out accuracy", ("heldout_accuracy",)),
    Figure("Token entropy", ("entropy_mean", "entropy_q10", "entropy_q90")),
    Figure("Semantic entropy", ("semantic_entropy",)),
    Figure("Groups without signal", ("zero_signal_fraction",)),
    Figure("Loss", ("loss",)),
    Figure("Gradient norm", ("grad_norm",)),
    Figure("Distance from the sampling policy", ("kl",)),
    Figure("Distance from the reference policy", ("kl_ref",)),
    Figure("Clipped tokens", ("clip_low", "clip_high")),
    Figure("Capped weights", ("weight_capped",)),
    Figure("Signs of the advantages", ("positive_correct", "negative_wrong", "kept_tokens")),
    Figure("Prompt weighting", ("weighting_mean", "weighting_min")),
)


def curve(
    figure: Figure, columns: Mapping[str, Sequence[float]], run: str, hue: str
) -> Spec | None:
    """One figure of one run over its rounds or updates, as its metrics are of either; None where
    it has no finite value."""
    count = axis(columns, figure.metrics[0].of) or "update"
    drawn = [
        one
        for one in figure.metrics
        if any(math.isfinite(value) for value in columns.get(one.name, ()))
    ]
    if not drawn:
        return None
    rows = [
        row
        for row in range(len(columns[count]))
        if any(math.isfinite(columns[one.name][row]) for one in drawn)
    ]
    steps = [columns[count][row] for row in rows]
    smooth = len(steps) >= SMOOTH_FROM
    values = []
    for one in drawn:
        raws = [columns[one.name][row] for row in rows]
        means = rolling_mean(raws, max(1, len(steps) // 40)) if smooth else raws
        for step, raw, mean in zip(steps, raws, means, strict=True):
            if math.isfinite(raw):
                values.append({count: step, "raw": raw, "mean": mean, "series": one.label})
    series = [one.label for one in drawn]
    hues = [hue, *SECONDARY][: len(series)]
    x = {
        "field": count,
        "type": "quantitative",
        "title": f"{count} of {run} training",
        "axis": {"grid": False, "tickMinStep": 1, "tickCount": 6},
        "scale": {"nice": False},
    }
    y = {
        "type": "quantitative",
        "title": figure.unit,
        "axis": {"tickCount": 5, "minExtent": 38},
        "scale": {"zero": figure.unit not in ("loss", "multiplier")},
    }
    colours = {
        "field": "series",
        "type": "nominal",
        "scale": {"domain": series, "range": hues},
        "legend": {} if len(series) > 1 else None,
    }
    line = {"type": "line", "strokeWidth": 2.2, "point": len(steps) < SMOOTH_FROM}
    layers: list[Spec] = [
        {"mark": line, "encoding": {"x": x, "y": {"field": "mean", **y}, "color": colours}}
    ]
    if smooth:
        faint = {"type": "line", "strokeWidth": 1, "opacity": 0.3}
        layers.insert(
            0, {"mark": faint, "encoding": {"x": x, "y": {"field": "raw", **y}, "color": colours}}
        )
    return {"width": 400, "height": 170, "data": {"values": values}, "layer": layers}
