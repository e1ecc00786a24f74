"""Charts for a page, of lines, intervals or scores: values in the coordinates of an SVG, which the template draws."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 420, 280  # of the whole picture, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40  # margins, for ticks and names of axes
WIDE, NUM_BARS, MARGIN = 880, 80, 0.02  # of a chart of scores: its width, bars along it, and room beside them
NAMES, ROW_HEIGHT = 150, 36  # of a chart of intervals: the margin for names of rows, and a row
NUM_TICKS = 6
DOTTED_POINTS = 30  # more would run into each other
LEAST_RADIUS, MOST_RADIUS = 2.5, 9.0

Values = Float[np.ndarray, " num_points"]
Scores = Float[np.ndarray, " _num_scores"]
Range = tuple[float, float]


class Line(NamedTuple):
    """What to draw: points that are not finite are left out.

    `tone` is a class of the page's style. `weights` in [0, 1] are the areas of the dots, the largest being 1; without
    any, a short line has small dots.
    """

    name: str
    tone: str
    x: Values
    y: Values
    weights: Values | None = None
    has_dots: bool = True


class Dot(NamedTuple):
    """A circle, and the text that a pointer finds there."""

    x: float
    y: float
    radius: float
    text: str


class DrawnLine(NamedTuple):
    """`points` is what SVG's polyline takes."""

    name: str
    tone: str
    points: str
    dots: list[Dot]


class Tick(NamedTuple):
    """Where a tick stands, and what it says."""

    place: float
    text: str


class Chart(NamedTuple):
    """All that a template needs to draw it, in the picture's units, y downwards."""

    title: str
    x_name: str
    y_name: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[DrawnLine]
    mark: float | None  # x of a vertical line
    mark_name: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


class Measured(NamedTuple):
    """A row to draw: a figure with its interval, and what the same figure is elsewhere."""

    name: str
    value: float
    low: float
    high: float
    elsewhere: float


class DrawnRow(NamedTuple):
    """Where its middle stands, and its values along x; `text` is what a pointer finds there."""

    name: str
    y: float
    value: float
    low: float
    high: float
    elsewhere: float
    text: str


class IntervalChart(NamedTuple):
    """All that a template needs to draw intervals one below the other, in the picture's units, y downwards."""

    title: str
    x_name: str
    x_ticks: list[Tick]
    rows: list[DrawnRow]
    height: int
    width: int = WIDTH
    left: int = NAMES
    right: int = WIDTH - RIGHT
    top: int = TOP

    @property
    def bottom(self) -> int:
        """Where the axis is."""
        return self.height - BOTTOM


class Bar(NamedTuple):
    """A bar of a histogram, and the text that a pointer finds there."""

    x: float
    y: float
    width: float
    height: float
    text: str


class ScoreChart(NamedTuple):
    """All that a template needs to draw two histograms back to back, in the picture's units, y downwards.

    `upper` bars stand on `middle`, `lower` ones hang from it. `low` and `high` are the scores at `left` and `right`.
    """

    title: str
    x_name: str
    x_ticks: list[Tick]
    upper: list[Bar]
    lower: list[Bar]
    middle: float
    low: float
    high: float
    width: int = WIDE
    height: int = HEIGHT
    left: int = RIGHT
    right: int = WIDE - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def build_score_chart(title: str, names: tuple[str, str], upper: Scores, lower: Scores, also: Scores) -> ScoreChart:
    """Lay out histograms of two kinds of scores; a bar's height is its part of the scores of its kind.

    Args:
        title: what it shows, for those who do not see it.
        names: of the two kinds.
        also: other scores that must lie within the picture.
    """
    least, most = _find_range([upper, lower, also])
    margin = MARGIN * (most - least) or 1.0
    span = (least - margin, most + margin)
    edges = np.linspace(*span, NUM_BARS + 1)
    parts = [np.histogram(scores, edges)[0] / max(1, len(scores)) for scores in (upper, lower)]
    highest = [float(part.max()) for part in parts]
    unit = (HEIGHT - TOP - BOTTOM) / (sum(highest) or 1)
    middle = round(TOP + unit * highest[0], 1)
    drawn: list[list[Bar]] = [[], []]
    for side, (name, scores, part) in enumerate(zip(names, (upper, lower), parts, strict=True)):
        for start, end, value in zip(edges[:-1], edges[1:], part.tolist(), strict=True):
            left, right = (_place(float(edge), span, RIGHT, WIDE - RIGHT) for edge in (start, end))
            text = f"{round(value * len(scores))} {name} from {start:.4g} to {end:.4g}"
            height = round(unit * value, 1)
            if value:
                drawn[side].append(Bar(left, middle - height * (side == 0), round(right - left, 1), height, text))
    return ScoreChart(
        title=title,
        x_name="anomaly score (raw)",
        x_ticks=[
            Tick(_place(step, span, RIGHT, WIDE - RIGHT), f"{step:g}")
            for step in _choose_steps(span, False)
            if span[0] <= step <= span[1]
        ],
        upper=drawn[0],
        lower=drawn[1],
        middle=middle,
        low=span[0],
        high=span[1],
    )


def build_interval_chart(title: str, x_name: str, rows: Sequence[Measured]) -> IntervalChart:
    """Lay out intervals, the first at the top.

    Args:
        title: what it shows, for those who do not see it.
    """
    values = np.array([row[1:] for row in rows])
    steps = _choose_steps((float(values.min()), float(values.max())), False)
    return IntervalChart(
        title=title,
        x_name=x_name,
        x_ticks=[Tick(_place(step, steps, NAMES, WIDTH - RIGHT), f"{step:g}") for step in steps],
        rows=[_draw_row(row, position, steps) for position, row in enumerate(rows)],
        height=TOP + len(rows) * ROW_HEIGHT + BOTTOM,
    )


def _draw_row(row: Measured, position: int, steps: Sequence[float]) -> DrawnRow:
    value, low, high, elsewhere = (_place(one, steps, NAMES, WIDTH - RIGHT) for one in row[1:])
    text = f"{row.name}: {row.value:.4g} ({row.low:.4g} to {row.high:.4g})"
    return DrawnRow(row.name, TOP + (position + 0.5) * ROW_HEIGHT, value, low, high, elsewhere, text)


def build_chart(
    title: str,
    names: tuple[str, str],
    lines: Sequence[Line],
    *,
    x_range: Range | None = None,
    y_range: Range | None = None,
    whole_x: bool = False,
    mark: tuple[float, str] | None = None,
) -> Chart:
    """Lay out a chart.

    Args:
        title: what it shows, for those who do not see it.
        names: of the axes, x and y.
        x_range: lowest and highest x; that of the values if not given, as for `y_range`.
        whole_x: ticks at whole numbers alone, as for epochs.
        mark: an x to point out, and its name.
    """
    lines = [_drop_infinite(line) for line in lines]
    x_steps = _choose_steps(x_range or _find_range([line.x for line in lines]), whole_x)
    y_steps = _choose_steps(y_range or _find_range([line.y for line in lines]), False)

    axes = _Axes(x_steps, y_steps)
    return Chart(
        title=title,
        x_name=names[0],
        y_name=names[1],
        x_ticks=[Tick(axes.place_x(step), f"{step:g}") for step in x_steps],
        y_ticks=[Tick(axes.place_y(step), f"{step:g}") for step in y_steps],
        lines=[_draw_line(line, axes, names) for line in lines],
        mark=axes.place_x(mark[0]) if mark else None,
        mark_name=mark[1] if mark else "",
    )


class _Axes(NamedTuple):
    """Values to places in the picture: the first and last steps are its margins."""

    x_steps: list[float]
    y_steps: list[float]

    def place_x(self, value: float) -> float:
        return _place(value, self.x_steps, LEFT, WIDTH - RIGHT)

    def place_y(self, value: float) -> float:
        return _place(value, self.y_steps, HEIGHT - BOTTOM, TOP)


def _draw_line(line: Line, axes: _Axes, names: tuple[str, str]) -> DrawnLine:
    places = [(axes.place_x(x), axes.place_y(y)) for x, y in zip(line.x, line.y, strict=True)]
    texts = [f"{line.name}: {names[0]} {x:.4g}, {names[1]} {y:.4g}" for x, y in zip(line.x, line.y, strict=True)]
    dots = [Dot(*place, radius, text) for place, radius, text in zip(places, _choose_radii(line), texts, strict=False)]
    return DrawnLine(line.name, line.tone, " ".join(f"{x},{y}" for x, y in places), dots)


def _drop_infinite(line: Line) -> Line:
    kept = np.isfinite(line.x) & np.isfinite(line.y)
    weights = None if line.weights is None else line.weights[kept]
    return line._replace(x=line.x[kept], y=line.y[kept], weights=weights)


def _find_range(values: Sequence[Scores]) -> Range:
    joined = np.concatenate(values)
    return (float(joined.min()), float(joined.max())) if joined.size else (0.0, 1.0)


def _choose_steps(span: Range, whole: bool) -> list[float]:
    """Round numbers that enclose a range; one value has some room around it."""
    low, high = span if span[0] < span[1] else (span[0] - 1, span[1] + 1)
    locator = MaxNLocator(NUM_TICKS, steps=[1, 2, 2.5, 5, 10], integer=whole, min_n_ticks=1)
    return [float(step) for step in locator.tick_values(low, high)]


def _place(value: float, steps: Sequence[float], start: int, end: int) -> float:
    return round(float(start + (value - steps[0]) / (steps[-1] - steps[0]) * (end - start)), 1)


def _choose_radii(line: Line) -> list[float]:
    """A radius a point, or none at all."""
    if line.weights is not None:
        return [round(max(LEAST_RADIUS, MOST_RADIUS * float(weight) ** 0.5), 1) for weight in line.weights]
    return [LEAST_RADIUS] * len(line.x) if line.has_dots and len(line.x) <= DOTTED_POINTS else []
