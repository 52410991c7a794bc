"""Pictures, each a function that returns a matplotlib figure, for page, notebook, TensorBoard and report alike.

A figure's label says what it shows, for those who do not see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from bco_lightning.data.messages import printable
from bco_lightning.metrics import Array

UP, DOWN, PLAIN, LIMIT, GREY = "#2b7bb9", "#d8691f", "#8a9199", "#8b3fa8", "#8a8f94"
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a source may be called $x$
    "svg.fonttype": "none",
    "svg.hashsalt": "bco_lightning",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
}
_MOST_BINS = 36
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # the same picture is the same text


def to_svg(figure: Figure) -> str:
    """A figure as an ``svg`` element, the same text for the same figure."""
    written = StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(written, format="svg", transparent=True, bbox_inches="tight", metadata=_NO_METADATA)
    text = written.getvalue()
    return text[text.index("<svg") :]


def thumbs_by_source(by_source: Mapping[str, tuple[int, int]]) -> Figure:
    """A bar for each source, thumbs-up and thumbs-down one after the other."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(0.5 + 0.34 * len(by_source), "Thumbs-up and thumbs-down rows of each source")
        names = [_short(name) for name in by_source]
        ups, downs = zip(*by_source.values(), strict=True)
        axes.barh(range(len(names)), ups, color=UP)
        bars = axes.barh(range(len(names)), downs, left=ups, color=DOWN)
        said = [f" {up:,} up · {down:,} down" for up, down in by_source.values()]
        axes.bar_label(bars, said, color=GREY)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.margins(x=0.35)
    return figure


def rows_lost(lost: Mapping[str, int]) -> Figure:
    """A bar for each reason for which rows were lost or cut."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(0.5 + 0.34 * len(lost), "Rows lost, by reason")
        axes.bar_label(axes.barh(range(len(lost)), list(lost.values()), color=PLAIN), fmt=" {:,.0f}", color=GREY)
        axes.set_yticks(range(len(lost)), [_short(reason) for reason in lost])
        axes.invert_yaxis()
        axes.margins(x=0.2)
    return figure


def length_histogram(lengths: Array, thumbs_up: Array, what: str, limits: Mapping[str, int]) -> Figure:
    """Shares of thumbs-up rows above the line and of thumbs-down rows below it, by length in tokens.

    Args:
        lengths: Of each row, before anything was cut; what is beyond the 99th percentile goes into the last bar.
        thumbs_up: The thumb of each row.
        what: What is that long.
        limits: Limits by name; those within the picture are drawn.
    """
    reach = int(np.percentile(lengths, 99)) * 11 // 10 + 1
    edges = np.arange(0, reach + (width := max(1, -(-reach // _MOST_BINS))), width)
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(2.2, f"Length of {what}s in tokens, by class")
        for rows, sign, colour in ((thumbs_up, 1, UP), (~thumbs_up, -1, DOWN)):
            shares = np.histogram(np.minimum(lengths[rows], edges[-1] - 1), edges)[0] / max(1, rows.sum())
            axes.bar(edges[:-1], sign * shares, width * 0.92, align="edge", color=colour)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.yaxis.set_major_formatter(lambda share, _: f"{abs(share):.0%}")
        axes.set_xlabel(f"tokens of the {what}")
        for name, limit in limits.items():
            if limit <= edges[-1]:
                axes.axvline(limit, color=LIMIT, linestyle="--", linewidth=1.2, label=f"{name} {limit:,}")
                axes.legend(frameon=False, labelcolor=LIMIT)
    return figure


def roc(shares: Sequence[float]) -> Figure:
    """Thumbs-up rows that are found, against thumbs-down rows that are taken for one."""
    with mpl.rc_context(_STYLE):
        figure, axes = _square("ROC curve of the classifier of prompts, on prompts that it has not seen")
        axes.plot(np.linspace(0, 1, len(shares)), shares, color=UP)
        axes.set_xlabel("thumbs-down rows taken for thumbs-up")
        axes.set_ylabel("thumbs-up rows found")
    return figure


def calibration(bins: Sequence[tuple[float, float, float]]) -> Figure:
    """Predicted and observed shares of thumbs-up of so many rows; on the line, probabilities are right."""
    with mpl.rc_context(_STYLE):
        figure, axes = _square("Calibration of the classifier of prompts, on prompts that it has not seen")
        _, predicted, observed = zip(*bins, strict=True)
        axes.plot(predicted, observed, "o", color=UP)
        axes.set_xlabel("predicted share of thumbs-up")
        axes.set_ylabel("observed share")
    return figure


def weight_histogram(histogram: Sequence[tuple[float, float, float]]) -> Figure:
    """Shares of the thumbs-down rows by weight, on a logarithmic axis; 1 is a row that counts as without weights."""
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(2.2, "Importance weights of thumbs-down rows")
        low, high, shares = (np.array(values) for values in zip(*histogram, strict=True))
        axes.bar(low, shares, high - low, align="edge", color=DOWN, edgecolor="none")
        axes.axvline(1, color=LIMIT, linestyle="--", linewidth=1.2)
        axes.set_xscale("log")
        axes.set_xticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("weight of a thumbs-down row")
    return figure


def _axes(height: float, said: str) -> tuple[Figure, mpl.axes.Axes]:
    figure = Figure((5.6, height))
    figure.set_label(said)
    return figure, figure.subplots()


def _square(said: str) -> tuple[Figure, mpl.axes.Axes]:
    figure, axes = _axes(3.0, said)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure, axes


def _short(text: str, length: int = 44) -> str:
    text = printable(text)
    return text if len(text) <= length else f"…{text[1 - length :]}"
