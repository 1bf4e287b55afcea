"""Line charts: as SVG text for the report's page, and as a PNG where matplotlib is installed."""

import html
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 36
_MOST_POINTS = 600
_MOST_DOTS = 30  # a curve of so few points shows each


@dataclass(frozen=True, slots=True)
class Series:
    """One curve, or one level across the chart."""

    name: str
    """What the legend says."""
    points: Points
    """`(step, value)` in the order of the steps."""
    dashed: bool = False
    """A reference level rather than something measured over the steps."""


def level(name: str, value: float, last: float) -> Series:
    """Draw a value that does not depend on the step, up to step `last`."""
    return Series(name, [(0.0, value), (last, value)], dashed=True)


def svg(title: str, unit: str, series: Sequence[Series]) -> str:
    """Draw curves over steps as one `<svg>` element without outside references.

    Args:
        title: Read by screen readers.
        unit: Of the values, at the axis.
        series: Curves; at most eight keep colours of their own.
    """
    xs, ys = _finite(series)
    if not xs:
        return f"<p>{html.escape(title)}: nothing was measured.</p>"
    x_ticks, y_ticks = ticks(min(xs), max(xs), 6), ticks(*_robust(ys), 5)
    x0, x1, y0, y1 = x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)
        return across, _HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">',
        *_axes(x_ticks, y_ticks, unit, place(x0, y0), place(x1, y1)),
    ]
    for number, one in enumerate(series):
        inside = [place(x, min(max(y, y0), y1)) for x, y in _thin(one.points)]
        if inside:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in inside)
            dash = ' stroke-dasharray="5 4"' if one.dashed else ""
            parts.append(f'<polyline class="s{number % 8}"{dash} points="{line}"/>')
        if len(inside) <= _MOST_DOTS and not one.dashed:
            parts += [
                f'<circle class="s{number % 8}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
                for x, y in inside
            ]
    legend = "".join(
        f'<span class="s{number % 8}">{"╌" if one.dashed else "━"}</span> {html.escape(one.name)} '
        for number, one in enumerate(series)
    )
    return "".join([*parts, f'</svg><p class="legend">{legend}</p>'])


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    unit: str,
    low: tuple[float, float],
    high: tuple[float, float],
) -> list[str]:
    parts = []
    for i, tick in enumerate(y_ticks):
        y = low[1] + (high[1] - low[1]) * i / (len(y_ticks) - 1)
        parts.append(f'<line class="grid" x1="{low[0]}" x2="{high[0]}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{low[0] - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for i, tick in enumerate(x_ticks):
        x = low[0] + (high[0] - low[0]) * i / (len(x_ticks) - 1)
        parts.append(f'<text x="{x:.1f}" y="{low[1] + 16}" text-anchor="middle">{tick:.6g}</text>')
    middle = (low[0] + high[0]) / 2
    parts.append(f'<text x="{middle}" y="{low[1] + 32}" text-anchor="middle">step</text>')
    parts.append(
        f'<text transform="translate(12 {(low[1] + high[1]) / 2}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(unit)}</text>'
    )
    return parts


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round, evenly spaced values that enclose `low` and `high`: about `most` of them."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _finite(series: Sequence[Series]) -> tuple[list[float], list[float]]:
    points = [p for one in series for p in one.points if math.isfinite(p[1])]
    return [x for x, _ in points], [y for _, y in points]


def _robust(values: Sequence[float]) -> tuple[float, float]:
    """Return a range that a few spikes do not stretch; what lies outside is drawn at the edge."""
    order = sorted(values)
    low, high = order[0], order[-1]
    knee = order[int(0.98 * (len(order) - 1))]
    if high - low > 4 * (knee - low) > 0:
        high = low + 1.5 * (knee - low)
    return low, high


def _thin(points: Points) -> Points:
    """Keep at most `_MOST_POINTS`, evenly, and always the last."""
    kept = [p for p in points if math.isfinite(p[1])]
    if len(kept) <= _MOST_POINTS:
        return kept
    every = -(-len(kept) // _MOST_POINTS)
    return [*kept[:-1:every], kept[-1]]


def save_png(path: Path, title: str, unit: str, series: Sequence[Series]) -> str | None:
    """Draw the same as a PNG file.

    Returns:
        `None` when it is written, and otherwise one sentence that says what is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return (
            f"{path.name} is not drawn: matplotlib is not installed; "
            "pip install 'warploom[plot]' and start the same command again"
        )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for one in series:
        xs, ys = zip(*one.points, strict=True) if one.points else ((), ())
        dots = "o" if len(xs) <= _MOST_DOTS and not one.dashed else None
        style = "--" if one.dashed else "-"
        axes.plot(xs, ys, style, label=one.name, linewidth=1.4, marker=dots, markersize=3)
    finite = _finite(series)[1]
    if finite:
        low, high = _robust(finite)
        pad = 0.05 * (high - low) or 1.0
        axes.set_ylim(low - pad, high + pad)
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return None
