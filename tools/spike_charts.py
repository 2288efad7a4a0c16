"""Charts of spikes as SVG text; colours are those of the page that they stand in (`spike_page`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 920


@dataclass(frozen=True)
class Raster:
    """Spikes of a few neurons over a few tokens.

    Attributes:
        coding: the coding's name.
        steps: virtual steps drawn for each token.
        tokens: tokens drawn.
        neurons: neurons drawn.
        spikes: (token, step, neuron, sign) of each.
        hidden: spikes of these neurons and tokens at later steps, which are not drawn.
    """

    coding: str
    steps: int
    tokens: int
    neurons: int
    spikes: Sequence[tuple[int, int, int, int]]
    hidden: int


@dataclass(frozen=True)
class Column:
    """A bar: the share of all in 0..1, a name below it, a text above it, what pointing at it tells, and its colour."""

    share: float
    label: str
    above: str
    tooltip: str
    colour: str = "bar"


def columns(bars: Sequence[Column], height: int = 190) -> str:
    """Returns a chart of vertical bars."""
    left, top, bottom = 52, 22, 26
    ticks, step = _ticks(max((bar.share for bar in bars), default=0.0) or 1.0)
    scale = (height - top - bottom) / ticks[-1]
    pitch = (WIDTH - left - 6) / max(len(bars), 1)
    out = [_open(height)]
    for tick in ticks:
        y = height - bottom - tick * scale
        out.append(f'<line class="grid" x1="{left}" x2="{WIDTH - 6}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(_tick(left - 8, y + 4, _percent(tick, step), "end"))
    for i, bar in enumerate(bars):
        x, size = left + i * pitch, bar.share * scale
        y = height - bottom - size
        out.append(
            f'<rect class="{bar.colour}" x="{x + pitch * 0.12:.1f}" y="{y:.1f}" width="{pitch * 0.76:.1f}"'
            f' height="{size:.1f}"><title>{escape(bar.tooltip)}</title></rect>'
        )
        out += [_tick(x + pitch / 2, height - 8, bar.label)] if bar.label else []
        out += [_tick(x + pitch / 2, y - 6, bar.above)] if bar.above else []
    return "".join([*out, "</svg>"])


def panels(groups: Mapping[str, Sequence[tuple[str, float]]], *, percent: bool) -> str:
    """Returns small bar charts side by side, one for each group of (name, value), on one scale."""
    across = 2 if len(groups) > 1 else 1
    left, gap, top, high, foot = 46, 26, 26, 96, 24
    width = (WIDTH - gap * (across - 1)) / across
    ticks, step = _ticks(max((v for g in groups.values() for _, v in g), default=1.0) or 1.0)
    rows = -(-len(groups) // across)
    out = [_open(rows * (top + high + foot))]
    for n, (name, group) in enumerate(groups.items()):
        x0, y0 = (n % across) * (width + gap), (n // across) * (top + high + foot)
        out.append(f'<text class="head" x="{x0 + left:.1f}" y="{y0 + 15}">{escape(name)}</text>')
        for tick in ticks:
            y = y0 + top + high * (1 - tick / ticks[-1])
            label = _percent(tick, step) if percent else f"{tick:g}"
            out.append(
                f'<line class="grid" x1="{x0 + left:.1f}" x2="{x0 + width:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            out.append(_tick(x0 + left - 8, y + 4, label, "end"))
        pitch = (width - left) / len(group)
        every = next(e for e in (1, 2, 5, 10, 20, 50, 100, 1000) if e * pitch >= 22 or e == 1000)
        for i, (layer, value) in enumerate(group):
            bar = min(pitch * 0.72, 60)
            x, size = x0 + left + (i + 0.14) * pitch, high * value / ticks[-1]
            shown = f"{value:.1%}" if percent else f"{value:.3f}"
            out.append(
                f'<rect class="bar" x="{x:.1f}" y="{y0 + top + high - size:.1f}"'
                f' width="{bar:.1f}" height="{size:.1f}"><title>{escape(layer)}: {shown}</title></rect>'
            )
            if i % every == 0:
                out.append(_tick(x + bar / 2, y0 + top + high + 15, f"{i}"))
    return "".join([*out, "</svg>"])


def raster(drawn: Raster) -> str:
    """Returns a time-neuron raster: time runs to the right, step by step and token by token, neurons downwards."""
    left, top, bottom, row = 52, 6, 22, 6
    height = top + row * drawn.neurons + bottom
    token = (WIDTH - left - 6) / drawn.tokens
    step = (token - 8) / max(drawn.steps, 1)
    mark = min(step * 0.7, 5.0)
    floor = height - bottom
    out = [_open(height)]
    for t in range(drawn.tokens):
        x = left + t * token
        out.append(
            f'<rect class="band" x="{x:.1f}" y="{top}" width="{token - 4:.1f}" height="{floor - top}"/>'
        )
        out.append(_tick(x + token / 2 - 2, height - 6, f"token {t}"))
    for neuron in range(0, drawn.neurons, 10):
        out.append(_tick(left - 8, top + row * (neuron + 0.5) + 4, f"{neuron}", "end"))
    paths: dict[int, list[str]] = {1: [], -1: []}
    for t, s, neuron, sign in drawn.spikes:
        x = left + t * token + 2 + (s + 0.5) * step - mark / 2
        y = top + row * neuron + 1
        paths[sign].append(f"M{x:.1f} {y:.1f}h{mark:.1f}v{row - 2}h-{mark:.1f}z")
    for sign, kind in ((1, "plus"), (-1, "minus")):
        out.append(f'<path class="{kind}" d="{"".join(paths[sign])}"/>')
    return "".join([*out, "</svg>"])


def _open(height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img">'


def _tick(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(most: float) -> tuple[list[float], float]:
    """Returns round numbers from 0 to beyond ``most``, and their distance."""
    magnitude = 1.0
    while magnitude > most:
        magnitude /= 10
    while magnitude * 10 <= most:
        magnitude *= 10
    step = next(m * magnitude for m in (0.25, 0.5, 1.0, 2.5) if most / (m * magnitude) <= 4)
    ticks = [0.0]
    while ticks[-1] < most - 1e-9:
        ticks.append(round(ticks[-1] + step, 10))
    return ticks, step


def _percent(value: float, step: float) -> str:
    return f"{value * 100:.0f}%" if step * 100 >= 1 else f"{value * 100:g}%"
