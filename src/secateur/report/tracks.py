"""Where the lines of a drawing stand, and the tracks of groups past them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from secateur.graph.network import Network
from secateur.report.layers import Layer, Layout, Section

LINE = 0.225
"""The height of a line, in inches."""
HEADER = 0.27
"""The height of the header of a section, in inches."""
_GAP = 0.06

Stop = Literal["out", "in", "both", "other"]
"""What a layer does with a group whose track stops there: makes it, takes it, both, or only holds values for it."""


@dataclass(frozen=True)
class Line:
    """One line of a drawing, `y` inches down to its middle: a layer, or (None) the header of its section."""

    y: float
    section: Section
    layer: Layer | None


@dataclass(eq=False)
class Track:
    """A group as drawn: the lines that it stops at, with the roles of its axes there, and its column."""

    group: int
    stops: dict[int, set[str]] = field(default_factory=dict)
    column: int = 0

    @property
    def span(self) -> tuple[int, int]:
        """The first and the last line that it stops at."""
        return min(self.stops), max(self.stops)


def stop_of(roles: set[str]) -> Stop:
    """Returns how a track stops at a layer where the axes of its group have these roles."""
    if {"in", "out"} <= roles:
        return "both"
    return "out" if "out" in roles else "in" if "in" in roles else "other"


def place_lines(sections: Sequence[Section], y: float) -> tuple[list[Line], float]:
    """Returns the lines from `y` inches down, and where they end."""
    lines: list[Line] = []
    for section in sections:
        if section.title:
            y += _GAP
            lines.append(Line(y + HEADER / 2, section, None))
            y += HEADER
        for layer in section.layers:
            lines.append(Line(y + LINE / 2, section, layer))
            y += LINE
        y += _GAP if section.title else 0
    return lines, y


def find_tracks(network: Network, layout: Layout, lines: Sequence[Line]) -> list[Track]:
    """Returns the track of each group that is shown, in columns so that none overlap, the longest to the left."""
    of_axis: dict[int, list[int]] = {}
    for number, group in enumerate(network.groups):
        for axis, _ in group.members:
            of_axis.setdefault(axis, []).append(layout.stands_for[number])
    tracks: dict[int, Track] = {}
    for n, line in enumerate(lines):
        for axis in line.layer.axes if line.layer else ():
            for group in of_axis.get(axis, ()):
                stops = tracks.setdefault(group, Track(group)).stops
                stops.setdefault(n, set()).add(network.axes[axis].role)
    taken: list[list[tuple[int, int]]] = []
    for track in sorted(tracks.values(), key=lambda t: (t.span[0] - t.span[1], t.span[0], t.group)):
        first, last = track.span
        free = (i for i, spans in enumerate(taken) if all(last < a or b < first for a, b in spans))
        track.column = next(free, len(taken))
        if track.column == len(taken):
            taken.append([])
        taken[track.column].append(track.span)
    return list(tracks.values())
