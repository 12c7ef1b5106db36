"""Line and scatter charts as SVG whose points can be hovered and focused, and whose colours are those of the page.

Charts are drawn here, with ticks from matplotlib, because every point must lead to its runs, take the page's light,
dark or print colours, and be reachable by keyboard. The libraries that draw in the browser add megabytes of script to
every report, and matplotlib's SVG has fixed colours and ids that clash when several stand in one page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal
from xml.etree import ElementTree as Xml

WIDTH, HEIGHT = 380, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 12, 28, 46
STYLES = 8
"""Colours that the page defines, each with a marker of its own; more series take them again from the start."""
# Outlines of markers of about one area, centred on 0, 0.
_MARKERS = (
    "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0z",
    "M-4,-4h8v8h-8z",
    "M0,-5.4l5,9h-10z",
    "M0,-5.7l5.7,5.7l-5.7,5.7l-5.7,-5.7z",
    "M0,5.4l5,-9h-10z",
    "M-1.8,-5h3.6v3.2h3.2v3.6h-3.2v3.2h-3.6v-3.2h-3.2v-3.6h3.2z",
    "M0,-5.6l1.6,3.6l3.9,.4l-2.9,2.7l.8,3.9l-3.4,-2l-3.4,2l.8,-3.9l-2.9,-2.7l3.9,-.4z",
    "M-5,-2.9l5,-2.9l5,2.9v5.8l-5,2.9l-5,-2.9z",
)
Scale = Literal["linear", "log"]


@dataclass(frozen=True)
class Point:
    """A place with the words that describe it, the runs it comes from, and the half length of its error bar, if any."""

    x: float
    y: float
    words: str
    runs: tuple[int, ...] = ()
    error: float | None = None
    facets: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Series:
    """Points of one colour and marker. A `path` (a training curve) is hovered as a whole."""

    name: str
    style: int
    points: tuple[Point, ...]
    is_line: bool = True
    is_path: bool = False
    marker: int | None = None


@dataclass(frozen=True)
class Chart:
    """A panel: series over axes. `guide` is a line through points (x, y), of the name `guide_name`."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_scale: Scale = "linear"
    x_ticks: tuple[float, ...] = ()
    guide: tuple[tuple[float, float], ...] = ()
    guide_name: str = ""
    zero: bool = False


class _Frame:
    """From values to places on the sheet."""

    def __init__(self, chart: Chart) -> None:
        xs = [p.x for s in chart.series for p in s.points] + [x for x, _ in chart.guide]
        ys = [p.y + sign * (p.error or 0) for s in chart.series for p in s.points for sign in (-1, 1)]
        ys += [y for _, y in chart.guide] + ([0.0] if chart.zero else [])
        self.is_log = chart.x_scale == "log"
        self.x_low, self.x_high = _widened([math.log10(x) for x in xs] if self.is_log else xs)
        self.y_low, self.y_high = _widened(ys)
        own = self._log_ticks() if self.is_log else _ticks(self.x_low, self.x_high)
        self.x_ticks = list(chart.x_ticks) or own
        self.y_ticks = _ticks(self.y_low, self.y_high)

    def x(self, value: float) -> float:
        share = ((math.log10(value) if self.is_log else value) - self.x_low) / (self.x_high - self.x_low)
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)

    def _log_ticks(self) -> list[float]:
        """Returns 1, 2 and 5 times powers of ten; fewer where those would crowd, even steps where they are rare."""
        powers = range(math.floor(self.x_low), math.ceil(self.x_high) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            ticks = [s * 10.0**p for p in powers for s in steps if self.x_low <= math.log10(s * 10.0**p) <= self.x_high]
            if len(ticks) <= 6:
                break
        return ticks if len(ticks) > 2 else _ticks(10**self.x_low, 10**self.x_high)


def _widened(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or max(1e-9, 0.05 * abs(high)) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [float(t) for t in MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= t <= high]


def tick_label(value: float) -> str:
    """Returns a number as short as it can be said: 2.5 M, 300 k, 0.02."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}".replace("-", "\N{MINUS SIGN}")
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}") if abs(value) > 1e-12 else "0"


def draw(chart: Chart) -> str:
    """Returns a chart as an `svg` element to put into a page; colours and fonts are up to the page's style."""
    svg = Xml.Element("svg", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="group")
    svg.set("class", "chart")
    svg.set("aria-label", f"{chart.title}: {chart.y_label} against {chart.x_label}")
    _text(svg, WIDTH / 2, 15, chart.title, "title")
    if not any(series.points for series in chart.series):
        _text(svg, WIDTH / 2, HEIGHT / 2, "no run to show", "label")
        return Xml.tostring(svg, encoding="unicode")
    frame = _Frame(chart)
    _axes(svg, chart, frame)
    if chart.guide:
        places = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in chart.guide)
        Xml.SubElement(svg, "polyline", {"class": "guide", "points": places})
    for series in chart.series:
        if series.is_path:
            _path(svg, series, frame)
        elif series.is_line and len(series.points) > 1:
            _line(svg, series, frame)
    for series in chart.series:
        for point in () if series.is_path else series.points:
            _point(svg, series, point, frame)
    return Xml.tostring(svg, encoding="unicode")


def _axes(svg: Xml.Element, chart: Chart, frame: _Frame) -> None:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    axes = Xml.SubElement(svg, "g", {"class": "axes", "aria-hidden": "true"})
    for tick in frame.y_ticks:
        y = f"{frame.y(tick)}"
        Xml.SubElement(axes, "line", {"class": "grid", "x1": str(_LEFT), "x2": str(right), "y1": y, "y2": y})
        _text(axes, _LEFT - 6, frame.y(tick) + 4, tick_label(tick), "tick end")
    if chart.zero:
        y = f"{frame.y(0)}"
        Xml.SubElement(axes, "line", {"class": "zero", "x1": str(_LEFT), "x2": str(right), "y1": y, "y2": y})
    for tick in frame.x_ticks:
        x = f"{frame.x(tick)}"
        Xml.SubElement(axes, "line", {"class": "axis", "x1": x, "x2": x, "y1": str(bottom), "y2": str(bottom + 4)})
        _text(axes, frame.x(tick), bottom + 18, tick_label(tick), "tick")
    Xml.SubElement(axes, "path", {"class": "axis", "d": f"M{_LEFT},{_TOP}V{bottom}H{right}"})
    _text(axes, (_LEFT + right) / 2, HEIGHT - 8, chart.x_label, "label")
    label = _text(axes, 0, 0, chart.y_label, "label")
    label.set("transform", f"translate(13,{(_TOP + bottom) / 2}) rotate(-90)")


def _text(parent: Xml.Element, x: float, y: float, text: str, kind: str) -> Xml.Element:
    element = Xml.SubElement(parent, "text", {"class": kind, "x": f"{x:g}", "y": f"{y:g}"})
    element.text = text
    return element


def marker_of(style: int) -> int:
    """Returns the marker of a style; those that share a colour have different ones."""
    return (style + style // STYLES) % len(_MARKERS)


def _style(series: Series) -> str:
    return f"s{series.style % STYLES}"


def _hoverable(parent: Xml.Element, kind: str, words: str, point: Point) -> Xml.Element:
    attributes = {"class": kind, "role": "img", "aria-label": words, "tabindex": "-1"}
    attributes["data-runs"] = " ".join(map(str, point.runs))
    return Xml.SubElement(parent, "g", attributes | {f"data-{k}": v for k, v in point.facets.items()})


def _line(svg: Xml.Element, series: Series, frame: _Frame) -> None:
    """Draws the line of a series piece by piece, so that it goes away with the points that are filtered out."""
    for a, b in zip(series.points, series.points[1:], strict=False):
        ends = {"x1": f"{frame.x(a.x)}", "y1": f"{frame.y(a.y)}", "x2": f"{frame.x(b.x)}", "y2": f"{frame.y(b.y)}"}
        facets = {f"data-{k}": v for k, v in b.facets.items() if k != "ratio"}
        Xml.SubElement(svg, "line", {"class": f"line {_style(series)}", **ends, **facets})


def _path(svg: Xml.Element, series: Series, frame: _Frame) -> None:
    group = _hoverable(svg, f"path {_style(series)}", series.points[-1].words, series.points[-1])
    places = " ".join(f"{frame.x(p.x)},{frame.y(p.y)}" for p in series.points)
    Xml.SubElement(group, "polyline", {"class": "near", "points": places})
    Xml.SubElement(group, "polyline", {"class": "line", "points": places})


def _point(svg: Xml.Element, series: Series, point: Point, frame: _Frame) -> None:
    x, y = frame.x(point.x), frame.y(point.y)
    group = _hoverable(svg, f"point {_style(series)}", point.words, point)
    if point.error is not None:
        top, bottom = frame.y(point.y + point.error), frame.y(point.y - point.error)
        Xml.SubElement(
            group, "path", {"class": "error", "d": f"M{x - 4},{top}h8M{x},{top}V{bottom}M{x - 4},{bottom}h8"}
        )
    marker = marker_of(series.style) if series.marker is None else series.marker
    outline = {"class": "mark", "d": _MARKERS[marker % len(_MARKERS)], "transform": f"translate({x},{y})"}
    Xml.SubElement(group, "path", outline)


def key(series: Sequence[tuple[str, int, int]], guide: str = "") -> str:
    """Returns the legend of charts that share names: (name, style, marker) each, and the name of the guide line."""
    parts = []
    for name, style, marker in series:
        item = Xml.Element("span", {"class": f"key s{style % STYLES}"})
        svg = Xml.SubElement(item, "svg", {"viewBox": "-8 -8 16 16", "aria-hidden": "true"})
        Xml.SubElement(svg, "path", {"class": "mark", "d": _MARKERS[marker % len(_MARKERS)]})
        svg.tail = name
        parts.append(Xml.tostring(item, encoding="unicode"))
    if guide:
        item = Xml.Element("span", {"class": "key"})
        svg = Xml.SubElement(item, "svg", {"viewBox": "-8 -8 16 16", "aria-hidden": "true"})
        Xml.SubElement(svg, "line", {"class": "guide", "x1": "-8", "x2": "8", "y1": "0", "y2": "0"})
        svg.tail = guide
        parts.append(Xml.tostring(item, encoding="unicode"))
    return "".join(parts)
