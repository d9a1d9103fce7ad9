"""The page's figures: Vega-Lite specifications as dicts, drawn as SVG without a browser."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from entrograd.errors import extra
from entrograd.report.scores import Score
from entrograd.report.tables import Bin, histogram

Spec = dict[str, Any]

INK, MUTED, GRID = "#1d2433", "#5b6475", "#e6e9ef"
COLOURS = ("#8b95a7", "#2f6fbf", "#0b8f6f", "#b4541a", "#7a4fb5", "#b3275f")
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"

CONFIG: Spec = {
    "background": None,
    "font": FONT,
    "padding": 4,
    "view": {"stroke": None},
    "axis": {
        "labelColor": MUTED,
        "titleColor": MUTED,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "gridColor": GRID,
        "domainColor": "#c3c9d4",
        "tickColor": "#c3c9d4",
        "titlePadding": 8,
        "labelFlush": False,
    },
    "title": {
        "anchor": "start",
        "color": INK,
        "fontSize": 14,
        "fontWeight": 600,
        "subtitleColor": MUTED,
        "subtitleFontSize": 12,
        "offset": 10,
    },
    "legend": {
        "labelColor": MUTED,
        "labelFontSize": 12,
        "title": None,
        "orient": "top",
        "symbolType": "stroke",
        "symbolOpacity": 1,
        "symbolStrokeWidth": 3,
    },
}


def svg(spec: Spec, name: str) -> str:
    """The figure as an SVG element to stand in a page; `name` keeps its ids apart from others'."""
    with extra("report"):
        import vl_convert
    full = {"$schema": "https://vega.github.io/schema/vega-lite/v5.json", "config": CONFIG, **spec}
    text: str = vl_convert.vegalite_to_svg(full)
    # Ids count up over the process's life: number them anew, or the bytes would differ.
    for number, old in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', text))):
        new = f"{name}-{number}"
        text = text.replace(f'id="{old}"', f'id="{new}"').replace(f"url(#{old})", f"url(#{new})")
    return text


def colour(index: int) -> str:
    """The colour of the model at this place in the order."""
    return COLOURS[index % len(COLOURS)]


def accuracy(models: Sequence[Score]) -> Spec:
    """Each model's accuracy as a point with its interval as a bar, in percent."""
    values = [
        {
            "model": m.name,
            "accuracy": 100 * m.value,
            "low": 100 * m.low,
            "high": 100 * m.high,
            "label": m.percent,
        }
        for m in models
    ]
    names = [m.name for m in models]
    y = {
        "field": "model",
        "type": "nominal",
        "sort": names,
        "title": None,
        "axis": {
            "labelFontSize": 14,
            "labelColor": INK,
            "labelPadding": 10,
            "domain": False,
            "ticks": False,
        },
    }
    hue = {
        "field": "model",
        "scale": {"domain": names, "range": [colour(i) for i in range(len(names))]},
        "legend": None,
    }
    x = {"type": "quantitative", "scale": {"domain": [0, 100]}, "axis": {"tickCount": 6}}
    title = "accuracy on the same problems, %"
    return {
        "width": 380,
        "height": 52 * len(models),
        "data": {"values": values},
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 7, "opacity": 0.35, "strokeCap": "round"},
                "encoding": {
                    "y": y,
                    "x": {"field": "low", "title": title, **x},
                    "x2": {"field": "high"},
                    "color": hue,
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 130, "opacity": 1},
                "encoding": {"y": y, "x": {"field": "accuracy", **x}, "color": hue},
            },
            {
                "mark": {"type": "text", "dy": -15, "fontSize": 13, "fontWeight": 600},
                "encoding": {
                    "y": y,
                    "x": {"field": "accuracy", **x},
                    "text": {"field": "label"},
                    "color": {"value": INK},
                },
            },
        ],
    }


def entropy_histogram(entropies: Sequence[float], high: float, bins: int) -> Spec:
    """How many groups have which semantic entropy, nats, from 0 to `high` = ln G."""
    width = high / bins
    values = [
        {"low": i * width, "high": (i + 1) * width, "groups": count}
        for i, count in enumerate(histogram(entropies, 0.0, high, bins))
    ]
    return {
        "width": 400,
        "height": 190,
        "data": {"values": values},
        "mark": {"type": "bar", "color": COLOURS[1], "binSpacing": 1.5},
        "encoding": {
            "x": {
                "field": "low",
                "type": "quantitative",
                "bin": {"binned": True},
                "title": "semantic entropy of the group, nats",
                "scale": {"domain": [0, high], "nice": False},
                "axis": {"grid": False, "tickCount": 6, "format": ".1f"},
            },
            "x2": {"field": "high"},
            "y": {
                "field": "groups",
                "type": "quantitative",
                "title": "groups",
                "axis": {"tickCount": 5, "tickMinStep": 1},
            },
        },
    }


def entropy_reward(bins: Sequence[Bin], high: float) -> Spec:
    """Mean reward of groups by their semantic entropy; a larger point stands for more groups."""
    values = [
        {"entropy": (b.low + b.high) / 2, "reward": b.mean_reward, "groups": b.groups} for b in bins
    ]
    x = {
        "field": "entropy",
        "type": "quantitative",
        "title": "semantic entropy of the group, nats",
        "scale": {"domain": [0, high], "nice": False},
        "axis": {"grid": False, "tickCount": 6, "format": ".1f"},
    }
    y = {
        "field": "reward",
        "type": "quantitative",
        "title": "mean reward",
        "scale": {"domain": [0, 1]},
        "axis": {"tickCount": 5},
    }
    size = {
        "field": "groups",
        "type": "quantitative",
        "scale": {"range": [20, 420], "zero": True},
        "legend": None,
    }
    return {
        "width": 400,
        "height": 190,
        "data": {"values": values},
        "layer": [
            {
                "mark": {"type": "line", "color": COLOURS[2], "strokeWidth": 1.5, "opacity": 0.5},
                "encoding": {"x": x, "y": y},
            },
            {
                "mark": {"type": "point", "filled": True, "color": COLOURS[2], "opacity": 0.9},
                "encoding": {"x": x, "y": y, "size": size},
            },
        ],
    }
