"""Pictures, each a function that returns a matplotlib figure, for page, notebook, TensorBoard and report alike.

A figure's label says what it shows, for those who do not see it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from sklearn.metrics import roc_curve

from bco_lightning.errors import printable
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
_MOST_BINS, _LONGEST, _FEW_POINTS = 36, 44, 30
_OF_PROMPTS = "the classifier of prompts, on prompts that it has not seen"
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # the same picture is the same text


def to_svg(figure: Figure) -> str:
    """A figure as an ``svg`` element, the same text for the same figure."""
    written = StringIO()
    with mpl.rc_context(_STYLE):
        if len(figure.axes) == 1:  # the page takes any size, and a layout takes half the time
            figure.set_layout_engine(None)
            figure.subplots_adjust(left=0.1, right=0.98)
        figure.savefig(written, format="svg", transparent=True, bbox_inches="tight", metadata=_NO_METADATA)
    text = written.getvalue()
    return text[text.index("<svg") :]


def thumbs_by_source(by_source: Mapping[str, tuple[int, int]]) -> Figure:
    """A bar for each source, thumbs-up and thumbs-down one after the other."""
    said = [f" {up:,} up · {down:,} down" for up, down in by_source.values()]
    ups, downs = zip(*by_source.values(), strict=True)
    return _bars("Thumbs-up and thumbs-down rows of each source", by_source, {UP: ups, DOWN: downs}, said, 0.35)


def rows_lost(lost: Mapping[str, int]) -> Figure:
    """A bar for each reason for which rows were lost or cut."""
    counts = list(lost.values())
    return _bars("Rows lost, by reason", lost, {PLAIN: counts}, [f" {count:,}" for count in counts], 0.2)


def length_histogram(lengths: Array, thumbs_up: Array, what: str, limits: Mapping[str, int]) -> Figure:
    """Shares of thumbs-up rows above the line and of thumbs-down rows below it, by length in tokens before cutting.

    What is beyond the 99th percentile goes into the last bar. Limits that are within the picture are drawn.
    """
    reach = int(np.percentile(lengths, 99)) * 11 // 10 + 1
    edges = np.arange(0, reach + (width := max(1, -(-reach // _MOST_BINS))), width)
    with _picture(f"Length of {what}s in tokens, by class") as (figure, axes):
        _back_to_back(axes, np.minimum(lengths, edges[-1] - 1), thumbs_up, edges)
        axes.set_xlabel(f"tokens of the {what}")
        for name, limit in limits.items():
            if limit <= edges[-1]:
                axes.axvline(limit, color=LIMIT, linestyle="--", linewidth=1.2, label=f"{name} {limit:,}")
                _legend_above(axes)
    return figure


def roc(shares: Sequence[float], of: str = _OF_PROMPTS) -> Figure:
    """Thumbs-up rows that are found, against thumbs-down rows that are taken for one, in equal steps of the latter."""
    across, up = "thumbs-down rows taken for thumbs-up", "thumbs-up rows found"
    with _square(f"ROC curve of {of}", across, up) as (figure, axes):
        axes.plot(np.linspace(0, 1, len(shares)), shares, color=UP)
    return figure


def roc_of_rewards(rewards: Array, thumbs_up: Array) -> Figure:
    """How well rewards tell held-out thumbs-up from thumbs-down rows; both have to be there."""
    false, true, _ = roc_curve(thumbs_up, rewards)
    return roc(np.interp(np.linspace(0, 1, 101), false, true).tolist(), "implicit rewards of held-out rows")


def calibration(bins: Sequence[tuple[float, float, float]], of: str = _OF_PROMPTS) -> Figure:
    """Predicted and observed shares of thumbs-up of so many rows; on the line, probabilities are right."""
    with _square(f"Calibration of {of}", "predicted share of thumbs-up", "observed share") as (figure, axes):
        axes.plot(*list(zip(*bins, strict=True))[1:], "o", color=UP)
    return figure


def reliability(rewards: Array, thumbs_up: Array, reward_shift: float) -> Figure:
    """:func:`calibration` of what rewards say of held-out rows, in ten groups of as many rows, by reward."""
    order = np.argsort(rewards, kind="stable")
    predicted = 1 / (1 + np.exp(reward_shift - rewards[order]))
    groups = [
        (float(len(some)), float(predicted[some].mean()), float(thumbs_up[order][some].mean()))
        for some in np.array_split(np.arange(len(order)), min(10, len(order)))
    ]
    return calibration(groups, "implicit rewards of held-out rows")


def reward_histogram(rewards: Array, thumbs_up: Array, reward_shift: float) -> Figure:
    """Shares of thumbs-up rows above the line and of thumbs-down rows below it, by implicit reward in nats.

    Rewards beyond the outer percentiles go into the first and the last bar.
    """
    low, high = np.percentile(rewards, (0.5, 99.5))
    edges = np.linspace(low, max(high, low + 1e-6), _MOST_BINS + 1)
    with _picture("Implicit rewards of held-out rows, by class") as (figure, axes):
        _back_to_back(axes, np.clip(rewards, edges[0], edges[-1]), thumbs_up, edges)
        axes.axvline(reward_shift, color=LIMIT, linestyle="--", linewidth=1.2, label=f"reward shift {reward_shift:.3g}")
        _legend_above(axes)
        axes.set_xlabel("implicit reward, nats")
    return figure


def reward_by_length(rewards: Array, thumbs_up: Array, lengths: Array) -> Figure:
    """Implicit rewards of held-out rows against their length: a slope says that length is what is rewarded."""
    with _picture("Implicit reward of held-out rows against length") as (figure, axes):
        for rows, colour, name in ((thumbs_up, UP, "thumbs-up"), (~thumbs_up, DOWN, "thumbs-down")):
            axes.plot(lengths[rows], rewards[rows], ".", color=colour, alpha=0.5, markersize=4, label=name)
        axes.set(xlabel="tokens of the completion", ylabel="implicit reward, nats")
        _legend_above(axes)
    return figure


def curves(what: str, lines: Mapping[str, Sequence[tuple[float, float]]], up: str = "") -> Figure:
    """One line for each name, by optimizer step; points that are not known are left out."""
    with _picture(f"{what} by optimizer step") as (figure, axes):
        for (name, points), colour in zip(lines.items(), itertools.cycle((UP, DOWN, LIMIT, "#3a8f5c", PLAIN))):
            known = np.reshape([point for point in points if np.isfinite(point[1])], (-1, 2))
            few: dict[str, Any] = {"marker": "o", "markersize": 3} if len(known) < _FEW_POINTS else {}
            axes.plot(*known.T, color=colour, linewidth=1.2, label=name, **few)
        axes.set(xlabel="optimizer step", ylabel=up)
        legend = len(lines) > 1
        if legend:
            _legend_above(axes)
        axes.set_title(what, loc="left", fontsize=9, color=GREY, pad=6 + legend * (2 + 13 * math.ceil(len(lines) / 3)))
    return figure


def weight_histogram(histogram: Sequence[tuple[float, float, float]]) -> Figure:
    """Shares of the thumbs-down rows by weight, on a logarithmic axis; 1 is a row that counts as without weights."""
    with _picture("Importance weights of thumbs-down rows") as (figure, axes):
        low, high, shares = (np.array(values) for values in zip(*histogram, strict=True))
        axes.bar(low, shares, high - low, align="edge", color=DOWN, edgecolor="none")
        axes.axvline(1, color=LIMIT, linestyle="--", linewidth=1.2)
        axes.set_xscale("log")
        axes.set_xticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("weight of a thumbs-down row")
    return figure


@contextmanager
def _picture(said: str, height: float = 2.2) -> Iterator[tuple[Figure, Axes]]:
    with mpl.rc_context(_STYLE):
        figure = Figure((5.6, height), layout="constrained")  # loggers draw it as large as it is
        figure.set_label(said)
        yield figure, figure.subplots()


def _legend_above(axes: Axes) -> None:
    """Where it hides nothing of the picture."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, labelcolor=GREY, fontsize=8)


def _back_to_back(axes: Axes, values: Array, thumbs_up: Array, edges: Array) -> None:
    for rows, sign, colour in ((thumbs_up, 1, UP), (~thumbs_up, -1, DOWN)):
        shares = np.histogram(values[rows], edges)[0] / max(1, rows.sum())
        axes.bar(edges[:-1], sign * shares, np.diff(edges) * 0.92, align="edge", color=colour)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.yaxis.set_major_formatter(lambda share, _: f"{abs(share):.0%}")


@contextmanager
def _square(what: str, across: str, up: str) -> Iterator[tuple[Figure, Axes]]:
    with _picture(what, 3.0) as (figure, axes):
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        axes.set(aspect="equal", xlabel=across, ylabel=up)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        yield figure, axes


def _bars(
    said: str, names: Iterable[str], counts: Mapping[str, Sequence[int]], labels: Sequence[str], margin: float
) -> Figure:
    """A row of bars for each name, one for each colour, and a label behind the last of them."""
    shown = [text if len(text := printable(name)) <= _LONGEST else f"…{text[1 - _LONGEST :]}" for name in names]
    with _picture(said, 0.5 + 0.34 * len(shown)) as (figure, axes):
        sizes = np.array(list(counts.values()))
        for colour, size, end in zip(counts, sizes, np.cumsum(sizes, axis=0), strict=True):
            bars = axes.barh(range(len(shown)), size, left=end - size, color=colour)
        axes.bar_label(bars, labels, color=GREY)
        axes.set_yticks(range(len(shown)), shown)
        axes.invert_yaxis()
        axes.margins(x=margin)
    return figure
