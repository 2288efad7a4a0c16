"""What ``spikingbrain spikes`` found, as one HTML page that needs nothing else: no scripts, no fonts, charts as inline SVG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

from spikingbrain.tools.spike_charts import Column, Raster, columns, panels, raster

if TYPE_CHECKING:
    from spikingbrain.models.spiking.observe import LayerCounts
    from spikingbrain.models.spiking.statistics import Statistics
    from spikingbrain.tools.spikes import Findings

MINUS = "\N{MINUS SIGN}"
NEURONS, TOKENS, STEPS = 40, 6, 16  # of a raster, at the most

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2430; --soft: #5b6675; --line: #dfe4ea; --band: #f3f5f8;
  --plus: #2b6cb0; --minus: #c2571a; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181f; --ink: #e6eaf0; --soft: #9aa6b5; --line: #2c3440;
  --band: #1d232c; --plus: #6cb0f0; --minus: #f2a065; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 32px 30px 64px; }
h1 { font-size: 27px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 40px 0 6px; }
h3 { font-size: 14px; margin: 20px 0 4px; font-weight: 600; }
p { margin: 4px 0 10px; color: var(--soft); } p.lead { color: var(--ink); }
code { font: 13px ui-monospace, monospace; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 22px 0 8px; }
.tile { background: var(--band); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 23px; font-weight: 600; line-height: 1.25; }
.tile span { color: var(--soft); font-size: 13px; }
@media (max-width: 700px) { .tiles { grid-template-columns: repeat(2, 1fr); } }
svg { display: block; width: 100%; height: auto; margin: 6px 0; }
.bar, .plus { fill: var(--plus); } .minus { fill: var(--minus); } .none { fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; } .band { fill: var(--band); }
.tick { fill: var(--soft); font-size: 11.5px; } .head { fill: var(--ink); font-size: 13px; font-weight: 600; }
.keys { white-space: nowrap; }
.keys i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 5px 0 12px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 12.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 6px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
summary { cursor: pointer; margin: 8px 0; } dt { font-weight: 600; margin-top: 8px; } dd { margin: 0; color: var(--soft); }
"""


def page(found: Findings) -> str:
    """Returns the page."""
    whole = found.total
    title = f"Spikes of {found.model}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="lead">{escape(found.about)}</p>',
            f"<p>Text: {escape(_short(found.text))}</p>",
            _tiles(whole),
            "<h2>Counts</h2>",
            "<p>How often a value fires: share of values by count s. A negative count is spikes of the other sign.</p>",
            _histogram(whole),
            "<h3>Bits of |s|</h3>",
            "<p>Steps that a value needs in the bitwise codings; 0 is silent.</p>",
            _bits(whole),
            "<h2>Layers</h2>",
            "<h3>Spikes per value (bitwise_ternary)</h3>",
            panels(_by_kind(found.parts, lambda s: s.spikes_per_value()), percent=False),
            "<h3>Silent values</h3>",
            panels(_by_kind(found.parts, lambda s: s.share(0, 0)), percent=True),
            _rasters(found.inputs),
            _blocks(found),
            "<h2>Every input</h2>",
            f"<details><summary>{len(found.parts)} inputs of {len(whole.layers)} layers</summary>",
            _table(found.rows()),
            "</details>",
            "<h2>Definitions</h2><dl>",
            *[f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in found.definitions.items()],
            "</dl></main></body></html>",
        ]
    )


def _tiles(whole: Statistics) -> str:
    energy = whole.energy
    tiles = [
        (f"{whole.spikes_per_value():.3f}", "spikes per value"),
        (f"{whole.share(0, 0):.1%}", "silent values"),
        (f"{whole.share(0, 7):.1%}", "|s| up to 7"),
        (f"{whole.largest}", "largest |s|"),
        (f"{whole.sparsity['needed_steps']:.1%}", "sparsity over needed steps"),
        (f"{whole.sparsity['window']:.1%}", "sparsity in 3 steps"),
        (_joules(energy["spikes"]), "additions of a token"),
        (f"{MINUS}{1 - energy['spikes'] / energy['fp16']:.1%}", "energy against FP16 MACs"),
    ]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{b}</b><span>{t}</span></div>' for b, t in tiles)
        + "</div>"
    )


def _joules(picojoules: float) -> str:
    """Returns an energy in a unit that suits it."""
    for size, unit in ((1e6, "µJ"), (1e3, "nJ")):
        if picojoules >= size:
            return f"{picojoules / size:.2f} {unit}"
    return f"{picojoules:.2f} pJ"


def _histogram(whole: Statistics, most: int = 16) -> str:
    numbers: Counter[int] = Counter()
    for s, n in whole.histogram.items():
        numbers[max(-most - 1, min(most + 1, s))] += n
    bars = []
    for s in range(-most - 1, most + 2):
        name = f"{s}" if abs(s) <= most else f"{'<' if s < 0 else '>'} {most if s > 0 else -most}"
        name = name.replace("-", MINUS)
        share = numbers[s] / whole.values
        label = name if (s % 2 == 0 and abs(s) < most) or abs(s) > most else ""
        colour = "minus" if s < 0 else "plus" if s > 0 else "none"
        bars.append(
            Column(share, label, "", f"s {'= ' if abs(s) <= most else ''}{name}: {share:.3%}", colour)
        )
    return columns(bars)


def _bits(whole: Statistics) -> str:
    numbers: Counter[int] = Counter()
    for s, n in whole.histogram.items():
        numbers[abs(s).bit_length()] += n
    bars = []
    for bits in range(max(numbers, default=0) + 1):
        low, high = (2 ** (bits - 1), 2**bits - 1) if bits else (0, 0)
        share = numbers[bits] / whole.values
        digits = 1 if share >= 0.01 or not share else -math.floor(math.log10(share)) - 2
        colour = "bar" if bits else "none"
        bars.append(
            Column(share, f"{bits}", f"{share:.{digits}%}", f"|s| from {low} to {high}: {share:.5%}", colour)
        )
    return columns(bars, height=170)


def _by_kind(
    parts: list[Statistics], value: Callable[[Statistics], float]
) -> dict[str, list[tuple[str, float]]]:
    """Returns (name, value) of every input, grouped by the last part of the names of its layers."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for part in parts:
        kind = ", ".join(name.rpartition(".")[2] for name in part.layers)
        groups.setdefault(kind, []).append((part.layers[0], value(part)))
    if len(groups) > 12 or all(len(group) == 1 for group in groups.values()):  # no repeating blocks
        return {"layers in order": [entry for group in groups.values() for entry in group]}
    return groups


def _rasters(inputs: list[LayerCounts]) -> str:
    from spikingbrain.models.spiking.codings import CODINGS, SIGNED

    seen = inputs[len(inputs) // 2]
    parts = [
        "<h2>The same counts in five codings</h2>",
        f"<p>Input of <code>{escape(seen.name)}</code>, its first {min(NEURONS, seen.counts.shape[1])} channels; within a token"
        " time runs step by step. "
        '<span class="keys"><i style="background:var(--plus)"></i>counts up'
        '<i style="background:var(--minus)"></i>counts down</span></p>',
    ]
    for coding in CODINGS:
        drawn = draw(seen, coding)
        notes = [f"{drawn.steps} steps"]
        if coding not in SIGNED:
            notes.append("it has no sign: |s| is drawn")
        if coding == "twos_complement":
            notes.append("spikes of the last step count down")
        if drawn.hidden:
            notes.append(f"{drawn.hidden} spikes at later steps are not drawn")
        parts += [
            f"<h3>{coding} <span style='font-weight:400'>({'; '.join(notes)})</span></h3>",
            raster(drawn),
        ]
    return "\n".join(parts)


def draw(seen: LayerCounts, coding: str) -> Raster:
    """Returns the spikes of the first channels in the first tokens, in as many steps as these need, up to `STEPS`."""
    from spikingbrain.models.spiking.codings import SIGNED, encode

    counts = seen.counts[:TOKENS, :NEURONS]
    train = encode(counts if coding in SIGNED else counts.abs(), coding)
    if coding == "twos_complement" and len(train):
        train = train.clone()
        train[-1] *= -1  # drawn as what it counts
    shown = train[:STEPS]
    spikes = [
        (token, step, neuron, int(shown[step, token, neuron]))
        for step, token, neuron in shown.nonzero().tolist()
    ]
    hidden = int(train[STEPS:].abs().sum())
    return Raster(coding, len(shown), counts.shape[0], counts.shape[1], spikes, hidden)


def _blocks(found: Findings) -> str:
    if not found.blocks:
        return ""
    rows: list[tuple[str, ...]] = [("block", "model's order", "ordered by activity")]
    rows += [
        (f"{b.size} bytes", f"{b.as_is / b.blocks:.3%}", f"{b.ordered / b.blocks:.3%}") for b in found.blocks
    ]
    rows.append(("1 channel (weights stored input by input)", f"{found.total.share(0, 0):.3%}", "the same"))
    return (
        "<h2>Weight blocks that one token need not read</h2><p>Rows of one-byte weights, a block of neighbouring channels that"
        " are all silent is skipped. Order and shares come from different halves of the text.</p>"
        + _table(rows)
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _short(text: str, length: int = 240) -> str:
    words = " ".join(text.split())
    return words if len(words) <= length else words[:length].rpartition(" ")[0] + " …"
