"""Pictures of results: ratios against TRL as bars, growth as curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OURS, THEIRS, DEMAND = "#1f6feb", "#9aa4af", "#d1242f"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws what ``speed.py run`` or ``speed.py growth`` wrote.

    Args:
        report: The contents of the JSON file.
        path: The PNG to write.

    Raises:
        SystemExit: If matplotlib is missing, or there is nothing to draw.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit('Pictures need matplotlib, which ".[dev]" installs: pip install matplotlib') from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not report.get("cases") and not report.get("points"):
        raise SystemExit(f"There is nothing to draw for {path.name}: it holds neither cases nor points.")
    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure = _bars(report["cases"], pyplot) if report.get("cases") else _curves(report["points"], pyplot)
    machine = report["machine"]
    figure.text(
        0.005, 0.005, f"{machine['cores']} cores, {machine['cpu']}, torch {machine['torch']}", color="gray", fontsize=8
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _bars(results: list[dict[str, Any]], pyplot: Any) -> Any:
    """For each case how many times as fast, with the range of the pairs and the demand, and the share of memory."""
    figure, (speed, memory) = pyplot.subplots(
        1, 2, figsize=(12, 1.8 + 0.5 * len(results)), sharey=True, layout="constrained", width_ratios=[3, 2]
    )
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    ratios = [result["summary"]["ratio"] for result in results]
    medians = [ratio["median"] for ratio in ratios]
    spread = [
        [ratio["median"] - ratio["least"] for ratio in ratios],
        [ratio["most"] - ratio["median"] for ratio in ratios],
    ]
    shares = [result["summary"]["memory_ratio"] for result in results]
    places = range(len(results))
    speed.barh(places, medians, xerr=spread, color=OURS, height=0.6, error_kw={"capsize": 3, "ecolor": "#0b2e6b"})
    memory.barh(places, shares, color=OURS, height=0.6)
    for axes, key, title, values, ends in (
        (speed, "min_speed", "tokens/s, times TRL's", medians, [ratio["most"] for ratio in ratios]),
        (memory, "max_memory", "peak memory, share of TRL's", shares, shares),
    ):
        axes.axvline(1, color=THEIRS, linestyle="--", linewidth=1)
        axes.set_title(title)
        demands = [result["case"][key] for result in results]
        known = [(demand, place) for place, demand in enumerate(demands) if demand is not None]
        if known:
            axes.scatter(*zip(*known, strict=True), marker="|", s=420, linewidths=2.5, color=DEMAND, zorder=3)
        right = max([1.0, *ends, *(demand for demand, _ in known)])
        for place, (value, end, demand) in enumerate(zip(values, ends, demands, strict=True)):
            axes.text(max(end, demand or 0) + 0.02 * right, place, f"{value:.2f}", va="center")
        axes.set_xlim(0, 1.12 * right)
    speed.set_yticks(places, [result["case"]["name"] for result in results])
    speed.invert_yaxis()
    figure.suptitle("Ours against TRL (bar: median and range over pairs of steps; red: demanded)", fontsize=12)
    return figure


def _curves(points: list[dict[str, Any]], pyplot: Any) -> Any:
    """Memory above, time below, one column for each curve."""
    names = list(dict.fromkeys(point["curve"] for point in points))
    figure, grid = pyplot.subplots(2, len(names), figsize=(3.9 * len(names), 6.8), squeeze=False, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    for (memory, seconds), name in zip(grid.T, names, strict=True):
        own = [point for point in points if point["curve"] == name and "skipped" not in point]
        for design, color in (("full logits", THEIRS), ("ours", OURS)):
            line = [point for point in own if point["design"] == design]
            values = [point[point["axis"]] for point in line]
            label = "full logits (TRL 1.13)" if design == "full logits" else design
            memory.plot(values, [point["extra_mib"] / 1024 for point in line], "o-", color=color, label=label)
            seconds.plot(values, [point["seconds"] for point in line], "o-", color=color, label=label)
            if design == "ours" and name in ("vocabulary", "head"):
                net = [point["net_mib"] / 1024 for point in line]
                memory.plot(values, net, "o:", color=color, label="ours less the head's gradient")
        axis = next(point["axis"] for point in points if point["curve"] == name)
        memory.set_title("log-probs alone" if name == "head" else f"whole model: {name}")
        for axes in (memory, seconds):
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.grid(alpha=0.3)
            if axis == "vocabulary":
                axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k")
        seconds.set_xlabel({"length": "tokens of the longest row", "batch": "rows"}.get(axis, axis))
    grid[0][0].set_ylabel("memory above the weights, GiB")
    grid[1][0].set_ylabel("forward and backward, s")
    grid[0][0].legend(fontsize=9)
    figure.suptitle("Growth of time and memory (random Llama, 4 layers, 512 wide, float32)", fontsize=12)
    return figure
