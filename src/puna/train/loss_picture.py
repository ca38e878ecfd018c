"""Draw curves of a training: as SVG text that stands in a page by itself, and as a PNG where matplotlib is.

SVG needs nothing, so that the report always has its curves. Colours are the page's (`var(--...)`). Knows
numbers by step, and nothing of trainings.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

Point = tuple[float, float]  # a step, and a value

_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 40
_MOST_POINTS = 600  # a line has no more corners than a screen shows
_FEWEST_TO_SMOOTH = 30


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Hold a line by its name; a few points of their own are drawn with dots."""

    name: str
    points: Sequence[Point]
    colour: str = "var(--line)"
    is_faint: bool = False
    has_dots: bool = False


def smoothed(points: Sequence[Point], weight: float | None = None) -> list[Point]:
    """Return the exponential mean of the values so far, without the pull of a beginning at zero.

    Without a weight it looks back over about a twenty-fifth of all points: more would hide a short training.
    """
    if weight is None:
        weight = min(0.98, max(0.5, 1 - 25 / max(len(points), 1)))
    mean, total, out = 0.0, 0.0, []
    for step, value in points:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        out.append((step, mean / total))
    return out


def with_smooth(name: str, points: Sequence[Point]) -> list[Curve]:
    """Return one curve of few points; of many the smooth one, over the points themselves, faint."""
    if len(points) < _FEWEST_TO_SMOOTH:
        return [Curve(name=name, points=points)]
    return [
        Curve(name="", points=points, is_faint=True),
        Curve(name=f"{name}, smoothed", points=smoothed(points)),
    ]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.9)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """Return about `most` points at most: the lowest and the highest of each stretch, so no peak is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    out: list[Point] = [points[0]]
    for start in range(1, len(points) - 1, size):
        part = points[start : min(start + size, len(points) - 1)]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        out += sorted(ends)
    return [*out, points[-1]]


def svg_chart(curves: Sequence[Curve], *, label: str, width: int = 720, height: int = 250) -> str:
    """Return an <svg> of the curves over their steps. There must be a finite point."""
    finite = [
        (step, value)
        for curve in curves
        for step, value in curve.points
        if math.isfinite(step) and math.isfinite(value)
    ]
    area = _Area.around(finite, width, height)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(label)}">',
        *area.grid(),
        *(line for curve in curves for line in area.curve(curve)),
        *_legend([curve for curve in curves if curve.name], height),
        "</svg>",
    ]
    return "\n".join(parts)


@dataclass(frozen=True, kw_only=True)
class _Area:
    """Hold which steps and values are drawn, and where."""

    left: float
    right: float
    low: float
    high: float
    width: int
    height: int

    @classmethod
    def around(cls, points: Sequence[Point], width: int, height: int) -> _Area:
        steps, values = zip(*points, strict=True)
        low, high = min(values), max(values)
        room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        floor = 0.0 if low >= 0 and low - room < 0 else low - room
        left, right = min(steps), max(steps)
        right = right if right > left else left + 1
        return cls(left=left, right=right, low=floor, high=high + room, width=width, height=height)

    def x(self, step: float) -> float:
        return round(_LEFT + (step - self.left) / (self.right - self.left) * (self.width - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM), 1)

    def grid(self) -> list[str]:
        bottom, end, lines = self.height - _BOTTOM, self.width - _RIGHT, []
        for value in ticks(self.low, self.high):
            y = self.y(value)
            lines.append(f'<line x1="{_LEFT}" y1="{y}" x2="{end}" y2="{y}" class="grid"/>')
            lines.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{_number(value)}</text>')
        for step in ticks(self.left, self.right, max(self.width // 90, 2)):
            if step == int(step):
                x = self.x(step)
                lines.append(f'<text x="{x}" y="{bottom + 17}" text-anchor="middle">{int(step):,}</text>')
        lines.append(f'<line x1="{_LEFT}" y1="{bottom}" x2="{end}" y2="{bottom}" class="axis"/>')
        return lines

    def curve(self, curve: Curve) -> list[str]:
        points = [point for point in thinned(curve.points) if math.isfinite(point[1])]
        places = [(self.x(step), self.y(value)) for step, value in points]
        corners = " ".join(f"{x},{y}" for x, y in places)
        faint = ' opacity="0.35"' if curve.is_faint else ""
        style = f'style="stroke:{curve.colour}"{faint}'
        lines = [f'<polyline class="curve" {style} points="{corners}"/>']
        if curve.has_dots or len(points) == 1:
            for (x, y), (step, value) in zip(places, points, strict=True):
                tip = html.escape(f"{curve.name}, step {step:,.0f}: {value:.4g}")
                dot = f'cx="{x}" cy="{y}" r="3.5" style="fill:{curve.colour}"'
                lines.append(f"<circle {dot}><title>{tip}</title></circle>")
        return lines


def _legend(curves: Sequence[Curve], height: int) -> list[str]:
    lines, x, y = [], float(_LEFT), height - 6
    for curve in curves:
        lines.append(
            f'<line x1="{x}" y1="{y - 4}" x2="{x + 18}" y2="{y - 4}" class="curve" '
            f'style="stroke:{curve.colour}"/>'
        )
        lines.append(f'<text x="{x + 24}" y="{y}">{html.escape(curve.name)}</text>')
        x += 44 + 7 * len(curve.name)
    return lines


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def can_draw_png() -> bool:
    """Say whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def write_png(path: Path, curves: Sequence[Curve], *, title: str) -> None:
    """Draw the curves as a picture of 1,600 x 900 dots. Needs matplotlib (`can_draw_png`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shades = iter(("#2a6f97", "#c8553d", "#6a994e", "#7b5ea7"))
    for curve in curves:
        steps, values = zip(*curve.points, strict=True)
        shade = "#9bb8c9" if curve.is_faint else next(shades)
        axes.plot(
            steps,
            values,
            color=shade,
            linewidth=0.8 if curve.is_faint else 1.6,
            marker="o" if curve.has_dots else None,
            markersize=4,
            label=curve.name or "_",
        )
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", metadata={"Software": None})
    part.replace(path)
