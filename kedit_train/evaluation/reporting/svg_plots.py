"""Small plots as SVG elements, for HTML reports. The plots need no plotting package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from kedit_train.evaluation.reporting.layer_drift import LayerDrift
from kedit_train.evaluation.reporting.report_lines import format_interval, format_number
from kedit_train.evaluation.scoring.bootstrap import Score
from kedit_train.plural import plural

# The colors of Okabe and Ito that can be seen on light and on dark backgrounds.
COLORS = ("#0084d1", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 220, 34, 10, 8, 34


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of :func:`scatter`.

    Args:
        x: position from 0 to 1.
        y: position from 0 to 1.
        title: text that a browser shows when the mouse is over the point.
        color: color of the point.
        filled: False draws only the outline.
        ring: True draws a ring around the point.
    """

    x: float
    y: float
    title: str
    color: str
    filled: bool = True
    ring: bool = False


def interval_bar(edited: Score, unedited: Score) -> str:
    """Return a bar from 0 to 1 with an interval (line), a score (dot), and the score of the unedited model (ring)."""
    low, high = (edited.low, edited.high) if edited.low is not None else (edited.value, edited.value)
    parts = ['<line x1="4" x2="116" y1="5" y2="5" stroke="currentColor" stroke-opacity=".25"/>']

    def x(value: float) -> str:
        return f"{4 + 112 * min(1.0, max(0.0, value)):.1f}"

    if edited.value is not None and low is not None and high is not None:
        parts.append(f'<line x1="{x(low)}" x2="{x(high)}" y1="5" y2="5" stroke="{COLORS[0]}" stroke-width="3"/>')
    if unedited.value is not None:
        ring = 'r="3" fill="none" stroke="currentColor" stroke-opacity=".7"'
        parts.append(f'<circle cx="{x(unedited.value)}" cy="5" {ring}/>')
    if edited.value is not None:
        parts.append(f'<circle cx="{x(edited.value)}" cy="5" r="3.5" fill="{COLORS[0]}"/>')
    return f'<svg class="interval" viewBox="0 0 120 10" aria-hidden="true">{"".join(parts)}</svg>'


def layer_bars(layers: Sequence[LayerDrift]) -> str:
    """Return one horizontal bar per layer. The bars show the relative change of each layer.

    If the relative change of at least one layer is unknown, all bars show the norm of the change instead.
    """
    relative = all(layer.relative is not None for layer in layers)
    values = [(layer.relative if relative else layer.change) or 0.0 for layer in layers]
    largest = max(values, default=0.0) or 1.0
    parts = []
    for row, (layer, value) in enumerate(zip(layers, values, strict=True)):
        y = 4 + 16 * row
        shown = f"{value:.2%}" if relative else f"{value:.3g}"
        tensors = plural(layer.tensors, "tensor")
        title = f"{layer.label}: norm of the change {layer.change:.4g}, {tensors}"
        parts.append(f'<text x="52" y="{y + 9}" text-anchor="end">{escape(layer.label)}</text>')
        width = 240 * value / largest
        bar = f'<rect x="58" y="{y}" width="{width:.1f}" height="11" rx="1.5" fill="{COLORS[0]}">'
        parts.append(f"{bar}<title>{escape(title)}</title></rect>")
        parts.append(f'<text x="{62 + width:.1f}" y="{y + 9}">{shown}</text>')
    return _svg(360, 8 + 16 * len(layers), "".join(parts), "change of the weights per layer")


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Return a scatter plot. Both axes go from 0 to 1, and later points are drawn on top of earlier points."""
    parts = [_frame([(value, f"{value:g}") for value in (0, 0.25, 0.5, 0.75, 1)], x_label, y_label)]
    for point in points:
        x, y = _place(point.x, point.y)
        paint = f'fill="{point.color}"' if point.filled else f'fill="none" stroke="{point.color}" stroke-width="1.5"'
        if point.ring:
            parts.append(f'<circle cx="{x}" cy="{y}" r="8" fill="none" stroke="{point.color}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" {paint}><title>{escape(point.title)}</title></circle>')
    return _svg(_WIDTH, _HEIGHT, "".join(parts), f"{y_label} against {x_label}")


def curves(scores: Mapping[str, Mapping[int, Score]], x_label: str) -> str:
    """Return a plot with one curve per name. Vertical lines show the 95 % intervals.

    The numbers on the horizontal axis are equally spaced, whatever their values are.

    Args:
        scores: for each curve name, a dict from the number on the horizontal axis to the score.
        x_label: label of the horizontal axis.
    """
    numbers = sorted({number for curve in scores.values() for number in curve})
    places = {number: (i + 0.5) / len(numbers) for i, number in enumerate(numbers)}
    step = -(-len(numbers) // 10)
    parts = [_frame([(places[number], f"{number:,}") for number in numbers[::step]], x_label, "")]
    for i, (name, curve) in enumerate(scores.items()):
        color = COLORS[i % len(COLORS)]
        # The curves are moved sideways a little, so that intervals do not hide each other.
        shift = 0.008 * (i - (len(scores) - 1) / 2)
        known = {number: score for number, score in curve.items() if score.value is not None}
        line = " ".join(",".join(_place(places[n] + shift, s.value or 0.0)) for n, s in known.items())
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        for number, score in known.items():
            x, y = _place(places[number] + shift, score.value or 0.0)
            if score.low is not None and score.high is not None:
                (_, low), (_, high) = _place(0, score.low), _place(0, score.high)
                parts.append(f'<line x1="{x}" x2="{x}" y1="{low}" y2="{high}" stroke="{color}" stroke-opacity=".5"/>')
            title = f"{name}, {number} edits: {format_number(score.value)} ({format_interval(score)})"
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"><title>{escape(title)}</title></circle>')
    return _svg(_WIDTH, _HEIGHT, "".join(parts), f"scores against {x_label}")


def legend(names: Sequence[tuple[str, str]]) -> str:
    """Return a line of HTML that explains colors. Each entry is a pair (name, color)."""
    entries = (f'<span><i style="background:{color}"></i>{escape(name)}</span>' for name, color in names)
    return f'<p class="legend dim">{"".join(entries)}</p>'


def _place(x: float, y: float) -> tuple[str, str]:
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    x, y = (min(1.0, max(0.0, value)) for value in (x, y))
    return f"{_LEFT + width * x:.1f}", f"{_TOP + height * (1 - y):.1f}"


def _frame(x_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str) -> str:
    parts = []
    for value in (0, 0.25, 0.5, 0.75, 1):
        x, y = _place(0, value)
        parts.append(
            f'<line x1="{x}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" stroke="currentColor" stroke-opacity=".18"/>'
        )
        parts.append(f'<text x="{_LEFT - 5}" y="{float(y) + 3.5}" text-anchor="end">{value:g}</text>')
    for place, text in x_ticks:
        parts.append(f'<text x="{_place(place, 0)[0]}" y="{_HEIGHT - 20}" text-anchor="middle">{escape(text)}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    height = (_TOP + _HEIGHT - _BOTTOM) / 2
    turned = f'transform="rotate(-90 8 {height})" text-anchor="middle"'
    parts.append(f'<text x="8" y="{height}" {turned}>{escape(y_label)}</text>' if y_label else "")
    return "".join(parts)


def _svg(width: int, height: int, content: str, label: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{content}</svg>'
