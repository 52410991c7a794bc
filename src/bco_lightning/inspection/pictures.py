"""Small pictures as inline SVG: no script, no font and no file of elsewhere; colours are those of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from bco_lightning.data.messages import printable
from bco_lightning.inspection.lengths import Histogram, LengthBias
from bco_lightning.metrics import Auc

WIDTH = 560
_LEFT, _RIGHT = 44, 12
_BAR, _BAR_STEP = 16, 44


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """An element; whatever is no markup yet is escaped.

    Example:
        >>> tag("text", "a < b", x=1, class_="label")
        Markup('<text x="1" class="label">a &lt; b</text>')
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _number(value))
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, Markup("").join(children))


def _number(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def _picture(height: float, said: str, *children: Markup) -> Markup:
    """A picture with a description for those who do not see it."""
    return tag("svg", tag("title", said), *children, viewBox=f"0 0 {WIDTH} {math.ceil(height)}", role="img")


def _label(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "label") -> Markup:
    return tag("text", text, x=float(x), y=float(y), text_anchor=anchor, class_=kind)


def _line(x: float, y: float, to_x: float, to_y: float, kind: str = "axis") -> Markup:
    return tag("line", x1=float(x), y1=float(y), x2=float(to_x), y2=float(to_y), class_=kind)


def _box(x: float, y: float, width: float, height: float, kind: str, **more: object) -> Markup:
    return tag("rect", x=float(x), y=float(y), width=float(max(width, 0)), height=float(height), class_=kind, **more)


def _cut_short(text: str, length: int) -> str:
    text = printable(text)
    return text if len(text) <= length else f"…{text[1 - length :]}"


def ticks(top: float, most: int = 6) -> list[float]:
    """Round numbers from 0 to at most ``top``.

    Example:
        >>> ticks(100)
        [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    """
    if not top > 0:
        return [0.0]
    rough = top / (most - 1)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(size * unit for size in (1, 2, 5, 10) if size * unit >= rough * (1 - 1e-9))
    return [number * step for number in range(int(top / step * (1 + 1e-9)) + 1)]


# --- bars


def thumbs_by_source(by_source: Mapping[str, tuple[int, int]]) -> Markup:
    """A bar for each source, thumbs-up and thumbs-down one after the other."""
    longest = max((up + down for up, down in by_source.values()), default=0) or 1
    scale = (WIDTH - 2 * _RIGHT) / longest
    parts = []
    for number, (name, (up, down)) in enumerate(by_source.items()):
        y = number * _BAR_STEP
        share = up / max(1, up + down)
        parts += [
            _label(0, y + 14, _cut_short(name, 50)),
            _label(WIDTH, y + 14, f"{up:,} up · {down:,} down · {share:.0%} up", anchor="end", kind="label muted"),
            _box(0, y + 21, up * scale - 1, _BAR, "up"),
            _box(up * scale + 1, y + 21, down * scale - 1, _BAR, "down"),
        ]
    return _picture(len(by_source) * _BAR_STEP, "Thumbs-up and thumbs-down rows of each source", *parts)


def bars(values: Mapping[str, int], of: int) -> Markup:
    """A bar for each number of rows, with its share of all rows."""
    scale = (WIDTH - 2 * _RIGHT) / max(values.values(), default=1)
    parts = []
    for number, (name, value) in enumerate(values.items()):
        y = number * _BAR_STEP
        parts += [
            _label(0, y + 14, _cut_short(name, 62)),
            _label(WIDTH, y + 14, f"{value:,} · {value / max(1, of):.1%}", anchor="end", kind="label muted"),
            _box(0, y + 21, max(1.0, value * scale), _BAR, "plain"),
        ]
    return _picture(len(values) * _BAR_STEP, "Rows lost, by reason", *parts)


# --- lengths


def length_histogram(histogram: Histogram, what: str, limits: Mapping[str, int]) -> Markup:
    """Shares of thumbs-up rows above the line and of thumbs-down rows below it, by length."""
    height, top, middle = 232, 24, 108
    reach, most = histogram.edges[-1], max(*histogram.up, *histogram.down, 1e-9)
    across = (WIDTH - _LEFT - _RIGHT) / reach
    up_scale = (middle - top) / most
    shares = ticks(most, 3)[1:]
    parts = [
        _grid_line(middle + sign * share * up_scale, f"{share:.2%}".replace(".00", ""))
        for share in shares
        for sign in (-1, 1)
    ]
    for left, right, up, down in zip(histogram.edges, histogram.edges[1:], histogram.up, histogram.down, strict=False):
        x, width = _LEFT + left * across, (right - left) * across - 0.8
        said = tag("title", f"{left:,} to {right - 1:,} tokens: {up:.1%} of thumbs-up, {down:.1%} of thumbs-down")
        parts.append(tag("g", said, _box(x, middle - up * up_scale, width, up * up_scale, "up"),
                         _box(x, middle, width, down * up_scale, "down")))  # fmt: skip
    parts += [_line(_LEFT, middle, WIDTH - _RIGHT, middle), *_length_axis(reach, across, 2 * middle - top + 18)]
    parts += _limit_lines(limits, reach, across, 2 * middle - top)
    if histogram.has_overflow:
        parts.append(
            _label(WIDTH - _RIGHT, 2 * middle - top + 34, "last bar: this and longer", anchor="end", kind="label muted")
        )
    return _picture(height, f"Length of {what}s in tokens, by class", *parts)


def _grid_line(y: float, text: str) -> Markup:
    return _line(_LEFT, y, WIDTH - _RIGHT, y, "grid") + _label(_LEFT - 6, y + 4, text, anchor="end", kind="label muted")


def _length_axis(reach: float, across: float, y: float) -> list[Markup]:
    return [
        _label(_LEFT + tick * across, y, f"{tick:,.0f}", anchor="middle", kind="label muted")
        for tick in ticks(reach)
        if tick * across < WIDTH - _LEFT - _RIGHT - 4
    ]


def _limit_lines(limits: Mapping[str, int], reach: int, across: float, bottom: float) -> list[Markup]:
    """Limits within the picture as lines, those beyond it as words."""
    parts, beyond = [], []
    for number, (name, limit) in enumerate(limits.items()):
        if limit > reach:
            beyond.append(f"{name} {limit:,} →")
            continue
        x = _LEFT + limit * across
        anchor = "end" if x > WIDTH / 2 else "start"
        y = 10 + 13 * number
        parts += [_line(x, y - 8, x, bottom, "limit")]
        parts += [
            _label(x + (-5 if anchor == "end" else 5), y, f"{name} {limit:,}", anchor=anchor, kind="label limit-name")
        ]
    if beyond:
        parts.append(_label(WIDTH - _RIGHT, 10, " · ".join(beyond), anchor="end", kind="label limit-name"))
    return parts


def length_fans(bias: LengthBias) -> Markup:
    """Deciles of the completion lengths of both classes, the median marked, the mean as a dot."""
    fans = (("up", bias.quantiles_up, bias.mean_up), ("down", bias.quantiles_down, bias.mean_down))
    reach = 1.06 * max([quantiles[9] for _, quantiles, _ in fans if quantiles] + [1.0])
    across = (WIDTH - _LEFT - _RIGHT) / reach
    parts = list(_length_axis(reach, across, 120))
    for number, (kind, quantiles, mean) in enumerate(fan for fan in fans if fan[1]):
        y = 12 + number * 48
        parts.append(_label(_LEFT - 8, y + 20, kind, anchor="end"))
        for inner in range(1, 5):
            left, right = quantiles[inner], quantiles[10 - inner]
            parts.append(_box(_LEFT + left * across, y, max((right - left) * across, 1.5), 30, f"{kind} band"))
        parts.append(_line(_LEFT + quantiles[5] * across, y - 4, _LEFT + quantiles[5] * across, y + 34, "median"))
        if mean <= reach:
            parts.append(tag("circle", cx=_LEFT + mean * across, cy=y + 15.0, r=4.5, class_="mean"))
    parts.append(
        _label(_LEFT, 140, "bands: 10–90, 20–80, 30–70, 40–60 % · line: median · dot: mean", kind="label muted")
    )
    return _picture(146, "Completion lengths in tokens of either class, as bands between percentiles", *parts)


# --- areas under curves


def interval_gauge(area: Auc, left: str, right: str, said: str) -> Markup:
    """An area with its interval on a line from 0 to 1; 0.5 is where nothing follows."""
    start, width, y = 10.0, WIDTH - 20.0, 26.0
    kind = "gauge-even" if area.is_even else "gauge-off"
    parts = [
        _box(start, y - 2, width, 4, "track"),
        _line(start + width / 2, y - 13, start + width / 2, y + 13, "median"),
        _box(start + area.low * width, y - 6, max((area.high - area.low) * width, 2.0), 12, kind, rx=6),
        tag("circle", cx=start + area.value * width, cy=y, r=5.0, class_="mean"),
        _label(start, y + 30, f"0 · {left}", kind="label muted"),
        _label(start + width / 2, y + 30, "0.5", anchor="middle", kind="label muted"),
        _label(start + width, y + 30, f"{right} · 1", anchor="end", kind="label muted"),
        _label(min(max(start + area.value * width, 24), WIDTH - 24), 11, f"{area.value:.3f}", anchor="middle"),
    ]
    return _picture(62, f"{said}: {area.value:.3f}, 95 % interval {area.low:.3f} to {area.high:.3f}", *parts)


def roc_curve(shares: Sequence[float]) -> Markup:
    """Thumbs-up rows that are found, against thumbs-down rows that are taken for one."""
    size, left, top = 250, 150.0, 8.0
    points = [(left + size * place / (len(shares) - 1), top + size * (1 - share)) for place, share in enumerate(shares)]
    path = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in [(left, top + size), *points])
    parts = [
        _box(left, top, size, size, "frame"),
        _line(left, top + size, left + size, top, "grid"),
        tag("path", d=f"{path} L{left + size:.1f} {top + size:.1f} Z", class_="roc-area"),
        tag("path", d=path, class_="roc"),
        _label(
            left + size / 2,
            top + size + 32,
            "thumbs-down rows taken for thumbs-up",
            anchor="middle",
            kind="label muted",
        ),
        _label(left - 10, top - 8 + size / 2, "thumbs-up", anchor="end", kind="label muted"),
        _label(left - 10, top + 8 + size / 2, "rows found", anchor="end", kind="label muted"),
    ]
    for share in (0, 0.5, 1):
        parts.append(_label(left + size * share, top + size + 15, f"{share:.0%}", anchor="middle", kind="label muted"))
    return _picture(top + size + 40, "ROC curve of the classifier of prompts, on prompts that it has not seen", *parts)


# --- importance weights


def calibration_plot(bins: Sequence[tuple[float, float, float]]) -> Markup:
    """Observed against predicted shares of thumbs-up; points on the line say that probabilities are right."""
    size, left, top = 250, 150.0, 8.0
    shares = [share for of in bins for share in of[1:]]
    # Where one class is rare all points are near 0 or 1, so the axes end at the tenths around them.
    least = max(0, math.floor(min(shares) * 10 - 1e-9)) / 10
    most = min(10, math.ceil(max(shares) * 10 + 1e-9)) / 10
    scale = size / (most - least)
    parts = [_box(left, top, size, size, "frame"), _line(left, top + size, left + size, top)]
    for count, predicted, observed in bins:
        said = f"{count:,.0f} rows: predicted {predicted:.1%}, observed {observed:.1%}"
        x, y = left + (predicted - least) * scale, top + size - (observed - least) * scale
        parts.append(tag("circle", tag("title", said), cx=float(x), cy=float(y), r=5.0, class_="up"))
    for place in (0, 0.5, 1):
        share = f"{least + (most - least) * place:.0%}"
        parts += [
            _label(left + size * place, top + size + 15, share, anchor="middle", kind="label muted"),
            _label(left - 8, top + size * (1 - place) + 8 * place, share, anchor="end", kind="label muted"),
        ]
    parts += [
        _label(left + size / 2, top + size + 32, "predicted share of thumbs-up", anchor="middle", kind="label muted"),
        _label(left - 50, top - 4 + size / 2, "observed", anchor="end", kind="label muted"),
        _label(left - 50, top + 12 + size / 2, "share", anchor="end", kind="label muted"),
    ]
    return _picture(
        top + size + 40, "Calibration of the classifier of prompts, on prompts that it has not seen", *parts
    )


def weight_histogram(histogram: Sequence[tuple[float, float, float]]) -> Markup:
    """Shares of the thumbs-down rows by weight, on a logarithmic axis; 1 is a row that counts as without weights."""
    top, bottom = 24, 222
    first, last = math.log(histogram[0][0]), math.log(histogram[-1][1])
    across = (WIDTH - _LEFT - _RIGHT) / (last - first)
    most = max(*(share for _, _, share in histogram), 1e-9)
    scale = (bottom - top) / most
    parts = [_grid_line(bottom - share * scale, f"{share:.2%}".replace(".00", "")) for share in ticks(most, 4)[1:]]
    for low, high, share in histogram:
        x, width = _LEFT + (math.log(low) - first) * across, math.log(high / low) * across - 0.8
        said = tag("title", f"weight {low:.3g} to {high:.3g}: {share:.1%} of thumbs-down rows")
        parts.append(tag("g", said, _box(x, bottom - share * scale, width, share * scale, "down")))
    for weight in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20):
        x = _LEFT + (math.log(weight) - first) * across
        if _LEFT - 1 <= x <= WIDTH - _RIGHT + 1:
            parts.append(_label(x, bottom + 18, f"{weight:g}", anchor="middle", kind="label muted"))
    even = _LEFT - first * across
    parts += [
        _line(_LEFT, bottom, WIDTH - _RIGHT, bottom),
        _line(even, top - 14, even, bottom, "limit"),
        _label(even + 5, top - 8, "1: as without weights", kind="label limit-name"),
        _label((WIDTH + _LEFT) / 2, bottom + 35, "weight of a thumbs-down row", anchor="middle", kind="label muted"),
    ]
    return _picture(bottom + 42, "Importance weights of thumbs-down rows", *parts)
