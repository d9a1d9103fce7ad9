"""Training curves: which columns of a training log are drawn, in what words, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from entrograd.report.plots import Spec
from entrograd.report.tables import axis, rolling_mean

SECONDARY = ("#c99a2e", "#b4541a")  # further lines of one figure
SMOOTH_FROM = 20  # points from which a curve is drawn smoothed, the raw values behind it


@dataclass(frozen=True)
class Metric:
    """A figure of training: the columns it draws, each with its word in the legend."""

    title: str
    unit: str
    columns: Mapping[str, str]
    explain: str


METRICS = (
    Metric(
        "Mean reward",
        "mean reward",
        {"reward_mean": "mean reward"},
        "Of each step's completions, as they were graded.",
    ),
    Metric(
        "Token entropy",
        "entropy, nats",
        {"entropy_mean": "mean", "entropy_q10": "10 % quantile", "entropy_q90": "90 % quantile"},
        "Of the policy that sampled the completions, over trained tokens. Offline these are the "
        "stored completions, so it shows the data; online, a fall to zero means that the model has "
        "stopped exploring.",
    ),
    Metric(
        "Semantic entropy",
        "entropy, nats",
        {"semantic_entropy": "semantic entropy"},
        "Mean over the step's groups: 0 where all completions of a group give the same answer.",
    ),
    Metric(
        "Groups without signal",
        "share of groups",
        {"zero_signal_fraction": "no signal"},
        "Groups whose completions all have the same reward: their advantages are zero.",
    ),
    Metric(
        "Loss",
        "loss",
        {"loss": "loss"},
        "The policy loss that is differentiated. It gives a direction and is no score: it need not "
        "fall.",
    ),
    Metric(
        "Gradient norm",
        "L2 norm",
        {"grad_norm": "gradient norm"},
        "Over all weights, before clipping.",
    ),
    Metric(
        "Distance from the sampling policy",
        "KL, nats a token",
        {"kl": "KL"},
        "KL divergence of the trained policy from the one that drew the completions (k3 estimate).",
    ),
    Metric(
        "Distance from the reference policy",
        "KL, nats a token",
        {"kl_ref": "KL"},
        "KL divergence of the trained policy from the reference model (k3 estimate).",
    ),
    Metric(
        "Clipped tokens",
        "share of tokens",
        {"clip_low": "below the bound", "clip_high": "above the bound"},
        "Trained tokens whose probability ratio has passed the bound in the direction of their "
        "advantage, so that they give no gradient.",
    ),
    Metric(
        "Capped weights",
        "share of tokens",
        {"weight_capped": "at the bound"},
        "Trained tokens with an advantage whose importance weight is the bound (CISPO); they keep "
        "their gradient.",
    ),
    Metric(
        "Signs of the advantages",
        "share of tokens",
        {
            "positive_correct": "correct, positive",
            "negative_wrong": "wrong, negative",
            "kept_tokens": "kept",
        },
        "Tokens of correct completions that are pushed up, of wrong ones that are pushed down, and "
        "tokens that a mask leaves in the loss; in groups with a signal.",
    ),
    Metric(
        "Prompt weighting",
        "multiplier",
        {"weighting_mean": "mean", "weighting_min": "smallest"},
        "The factor on a group's advantages.",
    ),
)


def curve(
    metric: Metric, columns: Mapping[str, Sequence[float]], run: str, hue: str
) -> Spec | None:
    """One metric of one run over its updates or rounds; None where it has no finite value."""
    count = axis(columns) or "update"
    steps = columns.get(count, ())
    names = [
        name
        for name in metric.columns
        if any(math.isfinite(value) for value in columns.get(name, ()))
    ]
    if not names:
        return None
    smooth = len(steps) >= SMOOTH_FROM
    values = []
    for name in names:
        rolled = rolling_mean(columns[name], max(1, len(steps) // 40)) if smooth else columns[name]
        for step, raw, mean in zip(steps, columns[name], rolled, strict=True):
            if math.isfinite(raw):
                row = {count: step, "raw": raw, "mean": mean, "series": metric.columns[name]}
                values.append(row)
    series = [metric.columns[name] for name in names]
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
        "title": metric.unit,
        "axis": {"tickCount": 5, "minExtent": 38},
        "scale": {"zero": metric.unit not in ("loss", "multiplier")},
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
