"""Time and memory of our log-probs and of TRL's formula, as the vocabulary, the length and the batch grow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

VOCABULARIES = (32_000, 49_152, 128_256, 256_000)
LENGTHS = (256, 1024, 2048, 4096)
BATCHES = (1, 4, 8, 16, 32)
DESIGNS = ("ours", "full logits")
Point = dict[str, Any]


def _points(designs: Sequence[str], axis: str, values: Sequence[int], **fixed: int) -> list[Point]:
    return [{"axis": axis, "design": design, **fixed, axis: value} for value in values for design in designs]


CURVES = {
    "vocabulary": lambda designs: _points(designs, "vocabulary", VOCABULARIES, batch=4, length=512),
    "length": lambda designs: _points(designs, "length", LENGTHS, batch=2, vocabulary=49_152),
    "batch": lambda designs: _points(designs, "batch", BATCHES, length=512, vocabulary=49_152),
    # The log-probs alone, from hidden states: `batch` rows of `length` completion tokens.
    "head": lambda designs: _points(designs, "vocabulary", VOCABULARIES, batch=1, length=1024),
}


def expected_gib(curve: str, point: Point) -> float:
    """Memory that a point takes, from what smaller ones took: copies of the logits, and activations."""
    tokens = point["batch"] * point["length"]
    logits = tokens * point["vocabulary"] * 4 / 2**30
    return logits * (4.3 if point["design"] == "full logits" else 0.3) + (0 if curve == "head" else tokens / 4096) + 2


def measure(curve: str, point: Point, limit_gib: float) -> Point:
    """Measures one point in a process of its own.

    Args:
        curve: A name in ``CURVES``.
        point: One of its points.
        limit_gib: Points expected to take more are left out.

    Returns:
        The point with ``seconds`` and ``extra_mib``, or with the reason why there is none as ``skipped``.
    """
    point = {"curve": curve, **point}
    if expected_gib(curve, point) > limit_gib:
        return point | {"skipped": f"expected to take {expected_gib(curve, point):.0f} GiB"}
    done = subprocess.run(
        [sys.executable, "-m", "workers.growth_point", json.dumps(point)],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,  # a traceback goes to the terminal
        text=True,
    )
    if done.returncode:
        return point | {"skipped": f"ended with status {done.returncode}"}
    return point | json.loads(done.stdout.splitlines()[-1])


def sentence(point: Point) -> str:
    """A point in words."""
    place = f"{point['curve']}, {point['axis']} {point[point['axis']]:,}, {point['design']}"
    if "skipped" in point:
        return f"{place}: left out, {point['skipped']}"
    return f"{place}: {point['seconds']:.2f} s, {point['extra_mib']:.0f} MiB, {point['net_mib']:.0f} MiB less gradients"


def table(curve: str, points: list[Point]) -> Table:
    """One curve as a table, a row for each value and design."""
    own = [point for point in points if point["curve"] == curve]
    title = "Log-probs alone" if curve == "head" else "Forward and backward of a random Llama (4 layers, 512 wide)"
    made = Table(own[0]["axis"], "design", "seconds", "extra MiB", "less the head's gradient", title=title)
    for point in own:
        numbers = (
            (point["skipped"], "", "")
            if "skipped" in point
            else (f"{point['seconds']:.2f}", f"{point['extra_mib']:.0f}", f"{point['net_mib']:.0f}")
        )
        made.add_row(f"{point[point['axis']]:,}", point["design"], *numbers)
    return made
