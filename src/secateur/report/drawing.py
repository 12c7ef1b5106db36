"""The drawing of a network: a line per layer with what it takes and makes, a track per group past all its layers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import InputError
from secateur.files import write_whole
from secateur.graph.network import STAYS, Network
from secateur.report.layers import Layer, Layout, Section, Side, lay_out
from secateur.report.table import quantity
from secateur.report.tracks import HEADER, LINE, Line, Track, find_tracks, place_lines, stop_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
# The palette of Okabe and Ito, told apart with any of the common colour blindnesses.
_COLOURS = {
    "embedding": "#0072B2",
    "heads": "#E69F00",
    "head_dims.qk": "#CC79A7",
    "head_dims.v": "#D55E00",
    "mlp": "#009E73",
    "conv": "#56B4E9",
}
_SPARE = ("#332288", "#882255", "#A08A00", "#44AA99")
"""For further families of a kind, after the colours of kinds that the network does not have."""
_MOST_FAMILIES = 8
"""Families of a kind up to which each has an entry in the legend of its own."""
_BAND = "#F4F5F7"
_TIMES = "\N{MULTIPLICATION SIGN}"
_GREY = "#767676"
_INK = "#222222"
# Inches.
_MARGIN = 0.3
_BAR = 0.115
_HALF = 1.45
_NUMBER = 0.62
_LONGEST_NAME = 4.3
_CAPTION = "groups, where each begins"
_RESOLUTION = 130
_TALLEST = 400
"""Lines that fit on a PNG of full resolution; longer drawings become coarser, as a PNG has at most 65,536 pixels."""


_FONTS = ["DejaVu Sans", "Verdana", "sans-serif"]
"""The first comes with matplotlib; others as wide or narrower, for readers of an SVG who do not have it."""
# Text stays text in an SVG: it can be searched, read aloud, and keeps the file small.
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "secateur",
    "font.family": "sans-serif",
    "font.sans-serif": _FONTS,
    "hatch.linewidth": 0.6,
}


def check_drawing(path: Path) -> None:
    """Raises InputError unless a drawing can be written to a file of this name: its suffix says SVG or PNG."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path} does not end in {' or '.join(SUFFIXES)}; the suffix chooses how it is drawn")


def save_drawing(network: Network, path: Path, title: str = "") -> None:
    """Writes a drawing of `network` as SVG or PNG, whichever the suffix of `path` says.

    Layers stand in the order in which the model defines them. A bar to the left is what a layer takes, to the right
    what it makes, coloured by family; each group of channels is a track that runs past all layers it lies in, and
    goes as a whole. Blocks that are alike are drawn once. What stays is hatched, with the reason and the line of code
    at the foot.

    Raises:
        InputError: The suffix is another one, or matplotlib is not installed.
    """
    check_drawing(path)
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise InputError("drawings need matplotlib: pip install 'secateur[report]'") from error
    with matplotlib.rc_context(_SETTINGS):
        sheet = _Sheet(network, lay_out(network), title)
        figure = sheet.draw()
        kind = path.suffix.lower().removeprefix(".")
        metadata: dict[str, Any] = {"Date": None, "Title": title or "network"} if kind == "svg" else {}
        dpi = _RESOLUTION * min(1.0, _TALLEST / max(1, len(sheet.lines)))
        write_whole(path, lambda file: figure.savefig(file, format=kind, dpi=dpi, metadata=metadata))


class _Sheet:
    """Measures, then draws. Coordinates are inches from the upper left corner."""

    def __init__(self, network: Network, layout: Layout, title: str) -> None:
        """Finds out where everything goes."""
        self.network = network
        self.layout = layout
        self.title = title
        self.ties: dict[int, str] = {}
        for i, (groups, _) in enumerate(layout.ties):
            self.ties |= {g: f"{self.ties.get(g, '')} ={_letter(i)}" for g in groups}
        self.colours = _colours(network)
        self.legend_rows = list(_flow(list(_legend(network)), 8.6))
        self.top = _MARGIN + 0.62 + 0.2 * len(self.legend_rows) + 0.62
        self.lines, self.bottom = place_lines(layout.sections, self.top)
        self.tracks = find_tracks(network, layout, self.lines)
        layers = [line.layer for line in self.lines if line.layer]
        self.name_x = _MARGIN + 0.12
        names = max([self._name_width(line) for line in self.lines] + [1.0])
        headers = [_width(_heading(s), bold=True) for s in layout.sections if s.title]
        stays = max([_width(_stays(layer), 7) for layer in layers] + [0.0])
        # A header may reach over the column of what stays, which is empty on its line.
        self.stays_x = self.name_x + max([names, *(h - stays for h in headers)]) + 0.3
        self.centre = self.stays_x + stays + 0.1 + _NUMBER + _HALF
        self.tracks_x = self.centre + _HALF + _NUMBER + 0.3
        columns = max([track.column for track in self.tracks] + [0]) + 1
        self.pitch = 0.2 if columns <= 10 else 0.13
        self.labels_x = self.tracks_x + columns * self.pitch + 0.1
        starts = [sum(_width(t, 7.5) + 0.32 for _, t in self._starting(n)) for n in range(len(self.lines))]
        self.width = max(self.labels_x + max([*starts, _width(_CAPTION, 7.5)]) + _MARGIN, 9.2)
        self.notes = list(self._notes(int((self.width - 2 * _MARGIN - 0.3) / 0.066)))
        self.height = self.bottom + 0.35 + 0.165 * len(self.notes) + _MARGIN
        self.scale = _HALF / _widest(layers)

    @staticmethod
    def _name_width(line: Line) -> float:
        if line.layer is None:
            return 0.0
        badge = "" if line.section.title else _badge(line.section)
        return _width(_shortened(line.layer.name)) + _width(badge, bold=True)

    def draw(self) -> Figure:
        """Returns the figure."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(self.width, self.height), facecolor="white")
        FigureCanvasAgg(figure)
        page = figure.add_axes((0, 0, 1, 1))
        page.set_xlim(0, self.width)
        page.set_ylim(self.height, 0)
        page.set_axis_off()
        self._head(page)
        self._background(page)
        for line in self.lines:
            if line.layer:
                self._layer(page, line.layer, line.section, line.y)
            else:
                _text(page, (self.name_x - 0.05, line.y), _heading(line.section), weight="bold")
        self._draw_tracks(page)
        y = self.bottom + 0.35
        for text, is_first in self.notes:
            _text(page, (_MARGIN + (0 if is_first else 0.3), y), text, size=7.5)
            y += 0.165
        return figure

    def _head(self, page: Axes) -> None:
        network = self.network
        _text(page, (_MARGIN, _MARGIN + 0.08), self.title or "network", size=13, weight="bold")
        facts = (
            f"{quantity(network.params)} parameters, {quantity(network.macs)} MACs per example, "
            f"{_many(len(network.groups), 'group')} of channels"
            f" in {_many(len(network.families), 'family', 'families')}"
        )
        _text(page, (_MARGIN, _MARGIN + 0.36), facts, size=9)
        y = _MARGIN + 0.68
        for row in self.legend_rows:
            x = _MARGIN
            for family, text in row:
                _box(page, x, y - 0.055, 0.16, 0.11, self.colours.get(family))
                _text(page, (x + 0.22, y), text)
                x += 0.22 + _width(text) + 0.28
            y += 0.2
        x = _MARGIN
        for roles, text in _STOPS.items():
            self._stop(page, [x + 0.08], [y], roles, _GREY)
            _text(page, (x + 0.22, y), text)
            x += 0.22 + _width(text) + 0.28
        y = self.top - 0.16
        for x, text, align in (
            (self.stays_x, "stays", "left"),
            (self.centre - 0.08, "takes  ◂", "right"),
            (self.centre + 0.08, "▸  makes", "left"),
            (self.labels_x, _CAPTION, "left"),
        ):
            _text(page, (x, y), text, size=7.5, colour=_GREY, align=align)

    def _background(self, page: Axes) -> None:
        """Draws a pale band behind each block, with a stronger edge where it stands for several."""
        first = 0
        for section in self.layout.sections:
            count = len(section.layers) + bool(section.title)
            mine = self.lines[first : first + count]
            first += count
            if section.title:
                top, bottom = mine[0].y - HEADER / 2, mine[-1].y + LINE / 2 + 0.02
                _box(page, _MARGIN, top, self.width - 2 * _MARGIN, bottom - top, _BAND, zorder=0)
                _box(page, _MARGIN - 0.06, top, 0.045, bottom - top, _INK if section.times > 1 else "#C9CDD3")
        for line in self.lines:
            if line.layer:
                page.plot(
                    [self.name_x + self._name_width(line) + 0.06, self.labels_x - 0.05],
                    [line.y, line.y],
                    color="#D9DCE1",
                    linewidth=0.5,
                    zorder=1,
                )

    def _layer(self, page: Axes, layer: Layer, section: Section, y: float) -> None:
        name = _shortened(layer.name)
        background = _BAND if section.title else "white"
        _text(page, (self.name_x, y), name)
        if section.times > 1 and not section.title:
            _text(page, (self.name_x + _width(name), y), _badge(section), weight="bold")
        if layer.stays:
            _text(page, (self.stays_x, y), _stays(layer), size=7, colour="#555555", background=background)
        self._bars(page, layer.takes, y, -1, background)
        self._bars(page, layer.makes or layer.holds, y, 1, background)

    def _bars(self, page: Axes, sides: Sequence[Side], y: float, direction: int, background: str) -> None:
        """Draws axes outwards from the centre: parts in the colours of their groups, the heads they lie in below."""
        x = self.centre + direction * 0.03
        for side in sides:
            thick = _BAR if self.network.axes[side.axis].role in ("in", "out") else _BAR / 2
            length = side.size * self.scale
            shown = min(max(length, 0.025), _HALF)
            start = x
            for part in side.parts:
                step = direction * shown * part.count / side.size
                colour = self.colours.get(self._family(part.group))
                _box(page, x, y - thick / 2, step, thick, colour, zorder=3)
                x += step
            if side.heads:
                _box(page, start, y + thick / 2 + 0.012, x - start, 0.03, self.colours[self._family(side.heads[0])])
            if length > _HALF:
                cut = start + direction * 0.8 * _HALF
                page.plot([cut - 0.03, cut + 0.03], [y + thick, y - thick], color="white", linewidth=2.5, zorder=4)
            x += direction * 0.03
        if sides:
            text = " + ".join(_size(side) for side in sides)
            align = "left" if direction > 0 else "right"
            _text(page, (x + direction * 0.02, y), text, size=7.5, align=align, background=background)

    def _draw_tracks(self, page: Axes) -> None:
        for track in self.tracks:
            x = self._track_x(track)
            colour = self.colours[self._family(track.group)]
            ys = [self.lines[n].y for n in track.span]
            page.plot([x, x], ys, color="white", linewidth=3.6, zorder=4, solid_capstyle="butt")
            page.plot([x, x], ys, color=colour, linewidth=2, zorder=5, solid_capstyle="butt")
            for roles in _STOPS:
                at = [self.lines[n].y for n, found in track.stops.items() if stop_of(found) == roles]
                self._stop(page, [x] * len(at), at, roles, colour)
        for n, line in enumerate(self.lines):
            x = self.labels_x
            for group, text in self._starting(n):
                _box(page, x, line.y - 0.045, 0.09, 0.09, self.colours[self._family(group)])
                _text(page, (x + 0.14, line.y), text, size=7.5)
                x += 0.14 + _width(text, 7.5) + 0.18

    @staticmethod
    def _stop(page: Axes, xs: Sequence[float], ys: Sequence[float], roles: str, colour: str) -> None:
        face = "white" if roles == "in" else colour
        page.plot(xs, ys, linestyle="none", color=colour, markerfacecolor=face, zorder=6, **_MARKERS[roles])
        if roles == "both":
            page.plot(xs, ys, linestyle="none", marker=".", markersize=3, color="white", zorder=7)

    def _track_x(self, track: Track) -> float:
        return self.tracks_x + track.column * self.pitch

    def _starting(self, number: int) -> list[tuple[int, str]]:
        """Returns the groups whose track begins at a line, from left to right, and what is written beside them."""
        found = sorted((t.column, t.group) for t in self.tracks if t.span[0] == number)
        return [(group, self._label(group)) for _, group in found]

    def _label(self, group: int) -> str:
        fibres, width = self.network.groups[group].channels.shape
        shape = f"{fibres} {_TIMES} {width}" if fibres > 1 else str(width)
        return f"{self.network.groups[group].family} {shape}{self.ties.get(group, '')}"

    def _family(self, group: int) -> str:
        return "" if group == STAYS else self.network.groups[group].family

    def _notes(self, columns: int) -> Iterator[tuple[str, bool]]:
        """Yields the lines at the foot, and whether each is the first of its note."""
        told = [f"[{i}]  stays: {note}" for i, note in enumerate(self.layout.notes, 1)]
        told += [f"={_letter(i)}  keep equal widths: {text}" for i, (_, text) in enumerate(self.layout.ties)]
        if any(side.heads for s in self.layout.sections for y in s.layers for side in (*y.takes, *y.makes)):
            told.append("A thin strip below a bar: these channels lie in heads, and go with their head as well.")
        for note in told:
            for i, line in enumerate(textwrap.wrap(note, columns)):
                yield line, i == 0


_MARKERS: dict[str, dict[str, Any]] = {
    "out": {"marker": "o", "markersize": 5.5},
    "in": {"marker": "o", "markersize": 5, "markeredgewidth": 1.3},
    "both": {"marker": "o", "markersize": 6},
    "other": {"marker": "_", "markersize": 6, "markeredgewidth": 1.6},
}


_STOPS = {
    "out": "the layer makes the group",
    "in": "takes it",
    "both": "takes and makes it",
    "other": "holds values for it (norm, bias, positions)",
}


def _legend(network: Network) -> Iterator[tuple[str, str]]:
    """Yields families with what is said of them; of many families of one kind, one entry for all."""
    families = network.families
    for kind, names in _by_kind(network).items():
        if len(names) > _MOST_FAMILIES:
            groups = sum(len(families[name]) for name in names)
            yield names[0], f"{kind}: {_many(groups, 'group')} in {len(names)} families (colours repeat)"
        else:
            for name in names:
                channels = sum(group.size for group in families[name])
                yield name, f"{name}: {_many(len(families[name]), 'group')}, {channels:,} channels"
    yield "", "stays, for reason [n]"


def _many(count: int, one: str, several: str = "") -> str:
    return f"{count} {one if count == 1 else several or one + 's'}"


def _flow(entries: Sequence[tuple[str, str]], width: float) -> Iterator[list[tuple[str, str]]]:
    """Yields legend entries row by row."""
    row: list[tuple[str, str]] = []
    used = 0.0
    for entry in entries:
        need = 0.5 + _width(entry[1])
        if row and used + need > width:
            yield row
            row, used = [], 0.0
        row.append(entry)
        used += need
    if row:
        yield row


def _kind(family: str) -> str:
    """Returns a family without the number that tells it from others of its kind."""
    stem, _, number = family.rpartition(".")
    return stem if number.isdigit() else family


def _by_kind(network: Network) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for family in network.families:
        kinds.setdefault(_kind(family), []).append(family)
    return kinds


def _colours(network: Network) -> dict[str, str]:
    """Returns a colour per family: that of its kind for the first, then those that are spare, over and over."""
    kinds = _by_kind(network)
    spare = [colour for kind, colour in _COLOURS.items() if kind not in kinds] + list(_SPARE)
    colours: dict[str, str] = {}
    for kind, families in kinds.items():
        own = [_COLOURS[kind], *spare]
        colours |= {family: own[i % len(own)] for i, family in enumerate(families)}
        spare = spare[len(families) - 1 :] or list(_SPARE)
    return colours


def _widest(layers: Iterable[Layer]) -> int:
    """Returns the width that a bar of full length stands for: the largest that a layer makes and that may shrink."""
    made = [side for layer in layers for side in layer.makes]
    movable = [side.size for side in made if any(part.group != STAYS for part in side.parts)]
    return max(movable or [side.size for side in made] or [1])


def _size(side: Side) -> str:
    notes = [part.note for part in side.parts if part.note]
    return f"{side.size}" + "".join(f" [{note}]" for note in dict.fromkeys(notes))


def _stays(layer: Layer) -> str:
    return "  ".join(f"{_TIMES.join(map(str, sizes))} [{note}]" for sizes, note in layer.stays)


def _heading(section: Section) -> str:
    return section.title + _badge(section)


def _badge(section: Section) -> str:
    return f"   {_TIMES} {section.times}" if section.times > 1 else ""


def _letter(number: int) -> str:
    """Returns A, B, … Z, AA, AB, …"""
    return (_letter(number // 26 - 1) if number >= 26 else "") + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[number % 26]


def _shortened(name: str) -> str:
    """Returns a name cut short in the middle where it would take more than its column."""
    if _width(name) <= _LONGEST_NAME:
        return name
    keep = int(len(name) * _LONGEST_NAME / _width(name) / 2) - 1
    return f"{name[:keep]}…{name[-keep:]}"


@cache
def _width(text: str, size: float = 8, bold: bool = False) -> float:
    """Returns how wide a text is, in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=_FONTS[0], size=size, weight="bold" if bold else "normal")
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def _text(
    page: Axes,
    at: tuple[float, float],
    text: str,
    size: float = 8,
    align: str = "left",
    colour: str = _INK,
    weight: str = "normal",
    background: str | None = None,
) -> None:
    box = {"facecolor": background, "edgecolor": "none", "pad": 0.6} if background else None
    page.text(
        *at,
        text,
        fontsize=size,
        ha=align,
        va="center_baseline",
        color=colour,
        fontweight=weight,
        bbox=box,
        zorder=8,
        parse_math=False,
    )


def _box(page: Axes, x: float, y: float, width: float, height: float, colour: str | None, zorder: float = 3) -> None:
    """Draws a filled box; without a colour, one hatched in grey: what stays."""
    from matplotlib.patches import Rectangle

    style = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.4}
    if colour is None:
        style = {"facecolor": "#EFEFEF", "edgecolor": _GREY, "linewidth": 0.5, "hatch": "//////"}
    page.add_patch(Rectangle((x, y), width, height, zorder=zorder, **style))
