"""A line plot as SVG, for RESULTS.md: logarithmic to the right, from zero upwards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 30, 45
COLOURS = ("#1f6f8b", "#c8553d", "#5b8e3e", "#8d5aa5")


def plot(title: str, across: str, up: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Each series is points (x, y) with x > 0; their axes are named `across` and `up`."""
    points = [point for line in series.values() for point in line]
    low, high = (math.log10(pick(x for x, _ in points)) for pick in (min, max))
    top = _round_up(max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        right = (math.log10(x) - low) / (high - low or 1)
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 18, title, size=14),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, across, anchor="middle"),
        f'<g transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">',
        _text(0, 0, up, anchor="middle"),
        "</g>",
    ]
    for step in range(5):
        y = top * step / 4
        at = place(10**low, y)[1]
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(_text(LEFT - 6, at + 4, f"{y:g}", anchor="end"))
    for power in range(math.ceil(low), math.floor(high) + 1):
        parts.append(_text(place(10**power, 0)[0], HEIGHT - BOTTOM + 16, f"{10**power:,}", anchor="middle"))
    for (name, line), colour in zip(series.items(), COLOURS, strict=False):
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place(*point) for point in line))
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in (place(*p) for p in line)]
        end = place(*line[-1])
        parts.append(_text(end[0] + 8, end[1] + 4, name, colour=colour))
    return "\n".join([*parts, "</svg>", ""])


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 10 times a power of ten: divides by four."""
    power = 10 ** math.floor(math.log10(value or 1))
    return next(step * power for step in (1, 2, 4, 8, 10) if step * power >= value)


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, colour: str = "#333") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
    )
