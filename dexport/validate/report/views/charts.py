"""Small charts as inline SVG, coloured by the page's own style, so that they follow its light and dark scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 40
MOST_TICKS = 6
MOST_DOTS = 60
SMALLEST = 1e-300
"""Of a logarithmic axis: below it, powers of ten are zero."""


def curves(
    series: Mapping[str, Sequence[tuple[float, float | None]]], label: str, limit: float | None = None
) -> Markup:
    """Lines over a logarithmic axis; what is zero or None is left out.

    Args:
        series: name -> points (x, y), x from 1.
        label: of the horizontal axis.
        limit: a dashed line.
    """
    drawn = {name: [(x, y) for x, y in points if y is not None and y > SMALLEST] for name, points in series.items()}
    values = [y for points in drawn.values() for _, y in points] + ([limit] if limit else [])
    if not values:
        return Markup("")
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    last = max(x for points in series.values() for x, _ in points)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - 1) / (last - 1) if last > 1 else 0.5
        up = (math.log10(y) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for power in _some(range(low, high + 1)):
        _, y = place(1, 10.0**power)
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "grid"))
        parts.append(_text(LEFT - 6, y + 4, f"1e{power}", "end"))
    for number in _some(range(1, int(last) + 1)):
        x, _ = place(number, 10.0**low)
        parts.append(_text(x, HEIGHT - BOTTOM + 18, str(number), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, label, "middle"))
    if limit:
        _, y = place(1, limit)
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, "limit"))
    for number, (name, points) in enumerate(drawn.items(), start=1):
        placed = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(Markup('<polyline class="line s{}" points="{}"/>').format(number, path))
        if len(points) <= MOST_DOTS:
            for (x, y), (step, value) in zip(placed, points, strict=True):
                parts.append(
                    Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="2.4"><title>{}</title></circle>').format(
                        number, x, y, f"{name}, {label} {step:g}: {value:.2e}"
                    )
                )
    return _svg(parts, HEIGHT, f"{', '.join(series)} by {label}")


def interval(value: float, low: float, high: float, limit: float | None, title: str) -> Markup:
    """An estimate with its interval, zero, and the limit as a dashed line."""
    marks = [0.0, value, low, high, *([] if limit is None else [limit])]
    start, end = min(marks), max(marks)
    pad = (end - start or 1.0) * 0.12
    start, end = start - pad, end + pad
    height, middle = 92, 40

    def place(number: float) -> float:
        return 12 + (number - start) / (end - start) * (WIDTH - 24)

    parts = [_line(place(0), 14, place(0), 66, "axis"), _text(place(0), 84, "0", "middle")]
    if limit is not None:
        side = "end" if place(limit) > WIDTH * 0.7 else "start" if place(limit) < WIDTH * 0.3 else "middle"
        parts += [
            _line(place(limit), 14, place(limit), 66, "limit"),
            _text(place(limit), 84, f"limit {limit:.3g}", side),
        ]
    parts += [_line(place(low), middle, place(high), middle, "whisker s1")]
    parts += [_line(place(end_), middle - 8, place(end_), middle + 8, "whisker s1") for end_ in (low, high)]
    parts.append(Markup('<circle class="dot s1" cx="{:.1f}" cy="{}" r="5"/>').format(place(value), middle))
    return _svg(parts, height, title)


def _svg(parts: Sequence[Markup], height: int, title: str) -> Markup:
    inside = Markup("").join(parts)
    start = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, title)
    return start + inside + Markup("</svg>")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    line = '<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'
    return Markup(line).format(kind, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, escape(text))


def _some(values: range) -> list[int]:
    """At most ``MOST_TICKS`` of consecutive numbers, evenly spread, the first and the last among them."""
    count = len(values)
    if count <= MOST_TICKS:
        return list(values)
    return sorted({values[round(index * (count - 1) / (MOST_TICKS - 1))] for index in range(MOST_TICKS)})
