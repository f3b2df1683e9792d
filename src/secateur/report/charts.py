"""Pictures as SVG that takes its colours from the page, so that it follows light and dark.

Every function returns the text of one ``<svg>``. Colours are classes (``s0`` to ``s7``, one for
each series) of ``page.css``; each series has a mark and a dash of its own too, since colours alone
do not tell everybody enough. What a mark stands for is its ``<title>``, which browsers show at the
pointer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil

from secateur.report.scales import Scale, linear, logarithmic

WIDTH = 440
#: Paper around the picture: left, right, top, bottom.
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 24, 42
DASHES = ("", "6 3", "2 3", "8 3 2 3")
#: Colours of series in the style sheet.
COLOURS = 8
#: Pixels that a character takes on the whole, at the size of labels.
CHARACTER = 8.0


@dataclass(frozen=True)
class Point:
    """A value, how far it spreads, and what to say at the pointer."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Points that belong together; ``number`` decides colour, mark and dash."""

    label: str
    points: Sequence[Point]
    number: int = 0


@dataclass(frozen=True)
class Bar:
    """A value with its label and the text that stands behind it."""

    label: str
    value: float
    text: str
    color: int = 0


@dataclass(frozen=True)
class Stripe:
    """One line of a heat map: shares by column, None where nothing is left; what to say of each."""

    label: str
    shares: Sequence[float | None]
    notes: Sequence[str] = field(default_factory=tuple)


def line_chart(
    series: Sequence[Series],
    *,
    x_title: str,
    y_title: str,
    log: bool = False,
    baseline: tuple[str, float] | None = None,
    y_zero: bool = False,
    places: int | None = None,
    height: int = 280,
) -> str:
    """Points over a common axis, joined in each series.

    Args:
        log: of the upright axis; values must be above 0.
        baseline: text and value of a line across.
        y_zero: whether the upright axis begins at 0, as the level one does.
        places: the level axis counts from 0 to below this, as columns of :func:`column_chart` do.
    """
    points = [point for one in series for point in one.points]
    if places is None:
        xs = linear([p.x for p in points], LEFT, WIDTH - RIGHT, zero=True)
    else:
        xs = _counted(places, LEFT)
    heights = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    if baseline is not None:
        heights.append(baseline[1])
    if log:
        ys = logarithmic(heights, height - BOTTOM, TOP)
    else:
        ys = linear(heights, height - BOTTOM, TOP, zero=y_zero)
    parts = [*_axes(xs, ys, x_title, y_title, height)]
    if baseline is not None:
        parts += _baseline(*baseline, ys)
    for one in series:
        number = one.number
        parts.append(f'<g class="s{number % COLOURS}">')
        ordered = sorted(one.points, key=lambda p: p.x)
        if len(ordered) > 1:
            path = " ".join(f"{xs.at(p.x)},{ys.at(p.y)}" for p in ordered)
            dash = DASHES[_style(number)]
            dashed = f' stroke-dasharray="{dash}"' if dash else ""
            parts.append(f'<polyline class="line" points="{path}"{dashed}/>')
        for point in ordered:
            parts += _spread(point, xs, ys)
            title = f"<title>{escape(one.label)}: {escape(point.note)}</title>"
            parts.append(f"<g>{mark(number, xs.at(point.x), ys.at(point.y))}{title}</g>")
        parts.append("</g>")
    return _svg(parts, height, f"{y_title} over {x_title}")


def _style(number: int) -> int:
    """Which of four marks and dashes; with a colour that comes again, another than before."""
    return (number + number // COLOURS) % len(DASHES)


def mark(number: int, x: float, y: float, r: float = 3.5) -> str:
    """The mark of the series with this number: disc, square, triangle or diamond."""
    kind = _style(number)
    if kind == 0:
        return f'<circle cx="{x}" cy="{y}" r="{r}"/>'
    if kind == 1:
        return f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}"/>'
    s = r * 1.3
    corners = [(0, -s), (s, s * 0.8), (-s, s * 0.8)]
    if kind == 3:
        corners = [(0, -s), (s, 0), (0, s), (-s, 0)]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{path}"/>'


def key(number: int) -> str:
    """What stands before a series' name in a legend: its line and its mark."""
    dash = DASHES[_style(number)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<svg class="key s{number % COLOURS}" viewBox="0 0 26 12" width="26" height="12" '
        f'aria-hidden="true"><line class="line" x1="0" x2="26" y1="6" y2="6"{dashed}/>'
        f"{mark(number, 13, 6)}"
        "</svg>"
    )


def column_chart(
    shares: Sequence[float | None], *, x_title: str, y_title: str, notes: Sequence[str]
) -> str:
    """A column for each block, in percent; a hatched one over the whole height for None."""
    height = 220
    count = len(shares)
    xs = _counted(count, LEFT)
    top = max((100 * s for s in shares if s is not None), default=0.0)
    ys = linear([top if None not in shares else 100.0], height - BOTTOM, TOP, zero=True)
    parts = [*_axes(xs, ys, x_title, y_title, height)]
    wide = 0.8 * (xs.at(1) - xs.at(0))
    for number, (share, note) in enumerate(zip(shares, notes, strict=True)):
        high = ys.at(100 if share is None else 100 * share)
        parts.append(
            f'<rect class="{"gone" if share is None else "s0"}" x="{xs.at(number) - wide / 2:.1f}" '
            f'y="{high}" width="{wide:.1f}" height="{height - BOTTOM - high:.1f}">'
            f"<title>{escape(note)}</title></rect>"
        )
    return _svg(parts, height, f"{y_title} over {x_title}")


def bar_chart(bars: Sequence[Bar], *, title: str) -> str:
    """Bars that lie, each with its label before and its value behind it."""
    longest = max(len(bar.label) for bar in bars)
    left = min(190, ceil(longest * CHARACTER) + 16)
    behind = ceil(max(len(bar.text) for bar in bars) * CHARACTER) + 8
    most = max(bar.value for bar in bars) or 1.0
    row, room = 24, WIDTH - left - behind
    parts = []
    for number, bar in enumerate(bars):
        y, wide = number * row, round(room * bar.value / most, 1)
        parts += [
            f'<text class="end" x="{left - 8}" y="{y + 16}">{_fitted(bar.label, left - 8)}</text>',
            f'<rect class="s{bar.color % COLOURS}" x="{left}" y="{y + 4}" width="{max(wide, 1)}" '
            f'height="{row - 8}" rx="2"/>',
            f'<text x="{left + wide + 6}" y="{y + 16}">{escape(bar.text)}</text>',
        ]
    return _svg(parts, row * len(bars) + 4, title)


def heat_map(stripes: Sequence[Stripe], *, top: float, x_title: str, title: str) -> str:
    """Shares as depth of colour, a line for each setting, a cross where a whole block went.

    Args:
        top: the share that has the full colour.
    """
    longest = max(len(stripe.label) for stripe in stripes)
    left = min(180, ceil(longest * CHARACTER) + 16)
    count, row = len(stripes[0].shares), 20
    xs = _counted(count, left)
    wide = xs.at(1) - xs.at(0)
    bottom = row * len(stripes)
    parts = []
    for number, stripe in enumerate(stripes):
        y = number * row
        label = _fitted(stripe.label, left - 8)
        parts.append(f'<text class="end" x="{left - 8}" y="{y + 14}">{label}</text>')
        for block, (share, note) in enumerate(zip(stripe.shares, stripe.notes, strict=True)):
            x = xs.at(block) - wide / 2
            gone = share is None
            depth = 1.0 if share is None else round(share / top, 3)
            color = "gone" if gone else "s0"
            parts.append(
                f'<g><rect class="cell" x="{x:.1f}" y="{y + 1}" width="{wide:.1f}" '
                f'height="{row - 2}"/><rect class="{color}" fill-opacity="{depth}" x="{x:.1f}" '
                f'y="{y + 1}" width="{max(wide - 0.6, 0.6):.1f}" height="{row - 2}"/>'
                + (_cross(x, y + 1, wide - 0.6, row - 2) if gone else "")
                + f"<title>{escape(note)}</title></g>"
            )
    for x, text in xs.texts():
        parts.append(f'<text class="middle" x="{x}" y="{bottom + 16}">{text}</text>')
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(f'<text class="middle" x="{middle}" y="{bottom + 34}">{escape(x_title)}</text>')
    return _svg(parts, bottom + 40, title)


def depth_key() -> str:
    """The legend of a heat map: from nothing to everything."""
    steps = "".join(
        f'<rect class="cell" x="{i * 24}" y="0" width="23" height="12"/>'
        f'<rect class="s0" fill-opacity="{i / 4}" x="{i * 24}" y="0" width="23" height="12"/>'
        for i in range(5)
    )
    return f'<svg class="key" viewBox="0 0 120 12" width="120" height="12">{steps}</svg>'


# ---- parts -------------------------------------------------------------------------------------


def _axes(xs: Scale, ys: Scale, x_title: str, y_title: str, height: int) -> list[str]:
    parts = [f'<text x="2" y="12">{escape(y_title)}</text>']
    for y, text in ys.texts():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{text}</text>')
    for x, text in xs.texts():
        parts.append(f'<text class="middle" x="{x}" y="{height - BOTTOM + 16}">{text}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="middle" x="{middle}" y="{height - 8}">{escape(x_title)}</text>')
    return parts


def _baseline(text: str, value: float, ys: Scale) -> list[str]:
    y = ys.at(value)
    return [
        f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>',
        f'<text class="end" x="{WIDTH - RIGHT}" y="{y - 4:.1f}">{escape(text)}</text>',
    ]


def _spread(point: Point, xs: Scale, ys: Scale) -> list[str]:
    if point.low is None or point.high is None or point.low == point.high:
        return []
    x, low, high = xs.at(point.x), ys.at(point.low), ys.at(point.high)
    return [
        f'<line class="line" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>',
        *(
            f'<line class="line" x1="{x - 4:.1f}" x2="{x + 4:.1f}" y1="{y}" y2="{y}"/>'
            for y in (low, high)
        ),
    ]


def _cross(x: float, y: float, wide: float, high: float) -> str:
    half = min(wide, high) / 2 - 1
    if half < 1:
        return ""
    cx, cy = x + wide / 2, y + high / 2
    return (
        f'<path class="cross" d="M{cx - half:.1f} {cy - half:.1f}L{cx + half:.1f} {cy + half:.1f}'
        f'M{cx - half:.1f} {cy + half:.1f}L{cx + half:.1f} {cy - half:.1f}"/>'
    )


def _fitted(label: str, room: float) -> str:
    """The label, shortened in the middle where it would leave the paper; whole at the pointer."""
    most = int(room / CHARACTER)
    if len(label) <= most:
        return escape(label)
    head = (most - 1) // 2
    short = label[:head] + "…" + label[len(label) - (most - 1 - head) :]
    return f"{escape(short)}<title>{escape(label)}</title>"


def _counted(count: int, start: float) -> Scale:
    """A level scale with a place for each of ``count`` things."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if count / s <= 8)
    ticks = tuple(float(i) for i in range(0, count, step))
    return Scale(-0.5, count - 0.5, start, WIDTH - RIGHT, ticks)


def _svg(parts: Sequence[str], height: int, label: str) -> str:
    body = "\n".join(parts)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}">\n{body}\n</svg>'
    )
