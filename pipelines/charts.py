"""Charts as inline SVG, drawn in batch: text and axes in the page's own colour, so that they read in light and dark.

Functions here say what to draw; `drawn` draws all charts of a page in one process of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import altair as alt
import numpy as np

from ope import Estimate, Report
from ope.data import FloatArray
from ope.selection import Shortlist

COLOURS = {"DM": "#8a8a8a", "IPS": "#2b8cc4", "SNIPS": "#d9660a", "DR": "#0f9d78"}
SHAPES = {"DM": "diamond", "IPS": "circle", "SNIPS": "square", "DR": "triangle-up"}
OTHER = "#b0569c"
"""Colour of an estimator that has none of its own."""

WIDTH = 700

Spec: TypeAlias = dict[str, Any]
"""A chart in Vega-Lite."""


def drawn(specs: Mapping[str, Spec]) -> dict[str, str]:
    """SVG of every chart, by name.

    In a child process: threads of the library that draws now and then abort the process that loaded it, when that ends.
    """
    if not specs:
        return {}
    found = subprocess.run(  # this interpreter, with a module of ours
        [sys.executable, "-P", "-m", "pipelines.draw"],
        input=json.dumps(list(specs.values())),
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise RuntimeError(f"drawing {', '.join(specs)} failed: {found.stderr.strip()[-500:]}")
    return dict(zip(specs, json.loads(found.stdout), strict=True))


def forest(reports: Mapping[str, Report], baseline: float) -> Spec:
    """Values with intervals, a band per policy, a mark per main estimator; refused estimates have a word instead of a mark."""
    rows = [
        {"policy": policy, **_point(report[name], name)} for policy, report in reports.items() for name in COLOURS if name in report
    ]
    return _themed(_forest(rows, _x, baseline, baseline))


def night_forest(rows: Sequence[Mapping[str, Any]], unit: str, baseline: float | None) -> Spec:
    """The same of a night's estimates: `policy`, `estimator`, `value`, `low`, `high`, `verdict`, `certified`; in their order.

    Intervals with uncertified rows in are dashed. `unit` is the axis' title. Numbers of refused estimates are None.
    """

    def x(name: str) -> alt.X:
        return alt.X(f"{name}:Q", title=unit, axis=alt.Axis(tickCount=7), scale=alt.Scale(zero=False))

    ends = [row["low"] for row in rows if row["low"] is not None]
    return _themed(_forest(rows, x, baseline, min(ends, default=0.0) if baseline is None else baseline))


def maturity(rows: Sequence[Mapping[str, Any]]) -> Spec:
    """Share of decisions with a label by their age, a line per day (`day`, `age_seconds`, `labelled`); the last day is bold."""
    unit, seconds = ("days", 86_400) if max(row["age_seconds"] for row in rows) >= 2 * 86_400 else ("hours", 3600)
    last = max(row["day"] for row in rows)
    data = [
        {"day": row["day"], "age": row["age_seconds"] / seconds, "labelled": row["labelled"], "last": row["day"] == last}
        for row in rows
    ]
    chart = alt.Chart(alt.Data(values=data)).mark_line(point=alt.OverlayMarkDef(size=12), color=COLOURS["IPS"]).encode(
        x=alt.X("age:Q", title=f"age of the decision, {unit}"),
        y=alt.Y("labelled:Q", title="share with a label", axis=alt.Axis(format="%"), scale=alt.Scale(zero=True)),
        detail="day:N",
        opacity=alt.condition("datum.last", alt.value(1), alt.value(0.3)),
        strokeWidth=alt.condition("datum.last", alt.value(2.5), alt.value(1)),
    )  # fmt: skip
    return _themed(chart.properties(width=WIDTH, height=180))


def check(forecasts: Sequence[Estimate], own: Estimate) -> Spec:
    """Each estimator's forecast with its interval, over the band of the click rate that was measured."""
    rows = [_point(estimate, estimate.estimator) for estimate in forecasts if estimate.verdict != "refused"]
    order = [estimate.estimator for estimate in forecasts]
    y = alt.Y("estimator:N", sort=order, title=None, axis=alt.Axis(ticks=False, domain=False))
    base = alt.Chart(alt.Data(values=rows)).encode(y=y)
    band = alt.Chart(alt.Data(values=[{"low": own.low, "high": own.high, "value": own.value}]))
    return _themed(
        alt.layer(
            band.mark_rect(opacity=0.18, color=COLOURS["IPS"]).encode(x=_x("low"), x2="high:Q"),
            band.mark_rule(strokeDash=[4, 4], color="currentColor").encode(x="value:Q"),
            base.mark_rule(strokeWidth=2, color=COLOURS["DR"]).encode(x=_x("low"), x2="high:Q"),
            base.mark_point(filled=True, size=70, opacity=1, color=COLOURS["DR"]).encode(x=_x("value")),
        ).properties(width=WIDTH, height=alt.Step(22))
    )


def weights(weight: FloatArray) -> Spec:
    """Share of rows and share of weight by size of the weight, in bins that double."""
    exponent = np.floor(np.log2(weight)).astype(int)
    rows = []
    for bin_ in range(int(exponent.min()), int(exponent.max()) + 1):
        inside = exponent == bin_
        label = f"{2.0**bin_:g}" if bin_ >= 0 else f"{2.0**bin_:.2g}"
        rows.append({"bin": label, "of": "rows", "share": float(inside.mean())})
        rows.append({"bin": label, "of": "weight", "share": float(weight[inside].sum() / weight.sum())})
    order = list(dict.fromkeys(str(row["bin"]) for row in rows))
    chart = alt.Chart(alt.Data(values=rows)).mark_bar().encode(
        x=alt.X("bin:N", sort=order, title="importance weight, at least (bins double)", axis=alt.Axis(labelAngle=0)),
        xOffset="of:N",
        y=alt.Y("share:Q", title="share", axis=alt.Axis(format="%")),
        color=alt.Color(
            "of:N",
            scale=alt.Scale(domain=["rows", "weight"], range=[COLOURS["DM"], COLOURS["SNIPS"]]),
            legend=alt.Legend(orient="top", title="share of"),
        ),
    )  # fmt: skip
    return _themed(chart.properties(width=WIDTH, height=180))


def portfolio(shortlists: Sequence[Shortlist], knee: int) -> Spec:
    """Four panels over k: what a larger A/B test could gain, and what it risks."""
    panels = {
        "gain": ("expected gain", "~g"),
        "std": ("expected spread", "~g"),
        "p_any_harm": ("P(any harm)", "%"),
        "violation": ("share below", "%"),
    }
    charts = []
    for name, (title, form) in panels.items():
        rows = [{"k": s.k, "value": getattr(s, name), "knee": s.k == knee} for s in shortlists]
        base = alt.Chart(alt.Data(values=rows)).encode(
            x=alt.X("k:O", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("value:Q", title=None, axis=alt.Axis(format=form, tickCount=4), scale=alt.Scale(zero=True)),
        )
        points = base.mark_point(filled=True, opacity=1).encode(
            size=alt.condition("datum.knee", alt.value(140), alt.value(50)), color=alt.value(COLOURS["DR"])
        )
        panel = alt.layer(base.mark_line(color=COLOURS["DR"]), points)
        charts.append(panel.properties(width=140, height=120, title=alt.Title(title, fontSize=11)))
    return _themed(alt.hconcat(*charts))


COSTS: Mapping[str, str] = {"rollouts": "rollouts", "cpu_seconds": "CPU seconds"}


def learning(rows: Sequence[Mapping[str, Any]], measures: Mapping[str, str], costs: Mapping[str, str] = COSTS) -> Spec:
    """A row per measure, over each cost: a line per `method`, one number of all its seeds, and a band.

    rows: `method`, the costs and each measure with `_low` and `_high`; `measures`, `costs`: titles by name.
    """
    order = list(dict.fromkeys(str(row["method"]) for row in rows))
    legend = alt.Legend(orient="top", title=None, symbolOpacity=1, symbolType="stroke", symbolStrokeWidth=2)
    colour = alt.Color("method:N", sort=order, legend=legend, scale=alt.Scale(scheme="tableau10"))
    lines = []
    for measure, title in measures.items():
        some = [row for row in rows if row.get(measure) is not None]
        panels = []
        for across, said in costs.items():
            base = alt.Chart(alt.Data(values=some)).encode(
                x=alt.X(f"{across}:Q", title=said, axis=alt.Axis(tickCount=5)), color=colour
            )
            y = alt.Y(f"{measure}:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4))
            band = base.mark_area(opacity=0.18).encode(y=alt.Y(f"{measure}_low:Q", title=title), y2=f"{measure}_high:Q")
            panels.append(alt.layer(band, base.mark_line(strokeWidth=1.8).encode(y=y)).properties(width=WIDTH // 2 - 60, height=90))
        lines.append(alt.hconcat(*panels))
    return _themed(alt.vconcat(*lines))


def _forest(rows: Sequence[Mapping[str, Any]], x: Callable[[str], alt.X], line: float | None, words_at: float) -> Any:
    """A band per policy, a mark per estimator, in the order of the rows; where a number is refused a word stands at `words_at`."""
    order = list(dict.fromkeys(str(row["policy"]) for row in rows))
    found = {str(row["estimator"]) for row in rows}
    names = [*(name for name in COLOURS if name in found), *sorted(found - COLOURS.keys())]
    y = alt.Y("policy:N", sort=order, title=None, axis=alt.Axis(ticks=False, domain=False, labelLimit=200))
    place: dict[str, Any] = {"y": y, "yOffset": alt.YOffset("estimator:N", sort=names)}
    legend = alt.Legend(orient="top", title=None)
    colour = alt.Color("estimator:N", scale=_scale({name: COLOURS.get(name, OTHER) for name in names}), legend=legend)
    shape = alt.Shape("estimator:N", scale=_scale({name: SHAPES.get(name, "cross") for name in names}), legend=legend)
    dash = alt.condition("datum.certified === false", alt.value([3, 3]), alt.value([]))
    shown, refused = "datum.verdict !== 'refused'", "datum.verdict === 'refused'"
    base = alt.Chart(alt.Data(values=list(rows)))
    bars = base.mark_rule(strokeWidth=2).encode(x=x("low"), x2="high:Q", color=colour, strokeDash=dash, **place)
    points = base.mark_point(filled=True, size=70, opacity=1).encode(x=x("value"), color=colour, shape=shape, **place)
    words = base.mark_text(align="left", color="currentColor", fontSize=10, dx=4).encode(
        x=alt.datum(words_at), text=alt.value("refused"), **place
    )
    layers = [bars.transform_filter(shown), points.transform_filter(shown), words.transform_filter(refused)]
    if line is not None:
        rule = alt.Chart(alt.Data(values=[{"x": line}])).mark_rule(strokeDash=[4, 4], color="currentColor").encode(x="x:Q")
        layers.insert(0, rule)
    return alt.layer(*layers).properties(width=WIDTH, height=alt.Step(14))


def _point(estimate: Estimate, name: str) -> dict[str, Any]:
    return {
        "estimator": name, "value": estimate.value, "low": estimate.low, "high": estimate.high, "verdict": estimate.verdict
    }  # fmt: skip


def _x(name: str) -> alt.X:
    return alt.X(f"{name}:Q", title="clicks per decision", axis=alt.Axis(format=".2%", tickCount=7), scale=alt.Scale(zero=False))


def _scale(values: Mapping[str, str]) -> alt.Scale:
    return alt.Scale(domain=list(values), range=list(values.values()))


def _themed(chart: Any) -> Spec:
    text = {"labelColor": "currentColor", "titleColor": "currentColor", "labelFontSize": 11, "titleFontSize": 11}
    themed = (
        chart.configure(
            background="transparent", font="system-ui, sans-serif", padding={"left": 24, "right": 8, "top": 4, "bottom": 4}
        )
        .configure_view(stroke=None)
        .configure_axis(gridColor="currentColor", gridOpacity=0.12, domainColor="currentColor", tickColor="currentColor", **text)
        .configure_legend(**text)
        .configure_title(color="currentColor", fontWeight="normal")
    )
    return dict(themed.to_dict())
