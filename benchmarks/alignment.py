"""Which objective? Each on the toy of ``toy.py`` in each setting, at matched KL, tuned by one rule.

Every objective is trained to the end at each beta, a grid from 32 to 1/32; its figures are those where the KL is 1/2,
by a line over sqrt(KL) between two betas. So beta is what makes the KL, for all alike, and nothing is stopped early.
The learning rate is the better of two by reward at that KL, on seeds of its own. Differences are to ``bco`` of the
same setting, paired by seed. ``results/alignment.json`` keeps what was computed, and none of it is computed again;
``alignment_model.py`` is the second scale.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import machine
from known_reward import interval
from toy import KL, Log, Objective, Prompts, World, draw_log, look, make_prompts, train
from toy_objectives import BCO, EVERY, UNPAIRED, LengthShift, Noisy, OddsByLength, PromptIntercept, PromptMidpoint

RESULTS = Path(__file__).parent / "results" / "alignment.json"
BETAS = [32 * 0.5**number for number in range(11)]
LEARNING_RATES, TUNING_SEEDS = (0.01, 0.03), [100, 101]
SEEDS, FRESH = range(10), range(10, 20)  # the latter decide about what was picked on the former
_BY_LENGTH = ("per token", "threshold by length", "odds by length", "weights by length")
PICKED = {f"bco, {name}" for name in ("prompt intercept", *_BY_LENGTH)}
FIGURES = ("reward", "tokens", "reward_neutral", "entropy")

Arms = dict[str, Callable[[], Objective]]
_PLAIN = "bco, no class weights"
_PROMPTS: Arms = {"bco, prompt midpoint": PromptMidpoint, "bco, prompt intercept": PromptIntercept}


def _noise(share: float) -> Arms:
    return {
        "bco, flips known": partial(Noisy, "likelihood", share),
        "bco, flips estimated": partial(Noisy, "likelihood"),
        "bco, unbiased": partial(Noisy, "unbiased", share),
    }


SETTINGS: dict[str, tuple[World, Arms]] = {
    "pairs": (World(each=2, pairs=True), EVERY | _PROMPTS),
    "balanced": (World(), UNPAIRED | {_PLAIN: BCO, "bco, odds by length": OddsByLength}),
    "10 % up": (World(share_up=0.1), UNPAIRED | {_PLAIN: BCO}),
    "90 % up": (World(share_up=0.9), UNPAIRED | {_PLAIN: BCO}),
    "10 % flipped": (World(noise=0.1), {"bco": BCO} | _noise(0.1)),
    "20 % flipped": (World(noise=0.2), UNPAIRED | _noise(0.2)),
    "30 % flipped": (World(noise=0.3), {"bco": BCO} | _noise(0.3)),
    "40 % flipped": (World(noise=0.4), UNPAIRED | _noise(0.4)),
    "five stars": (World(likert=True), UNPAIRED),
    "diverging prompts": (World(divergence=1.0), UNPAIRED | {"bco, importance weights": partial(BCO, "prompt")}),
    "4 answers": (World(each=4), EVERY | _PROMPTS),
    "4 answers, offsets 2": (World(each=4, offset=2.0), EVERY | _PROMPTS),
    "4 answers, offsets 4": (World(each=4, offset=4.0), EVERY | _PROMPTS),
    "2 answers, offsets 2": (World(each=2, offset=2.0), EVERY | _PROMPTS),
    "longer is liked": (
        World(taste=1.0),
        UNPAIRED
        | {
            "bco, per token": partial(BCO, per_token=True),
            "bco, midpoint by length": partial(LengthShift, "rewards"),
            "bco, threshold by length": partial(LengthShift, "thumbs"),
            "bco, odds by length": OddsByLength,
            "bco, weights by length": partial(BCO, "length"),
        },
    ),
}


class Cells:
    """What was computed, by setting, objective and seed; written after every objective."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        known = json.loads(path.read_text("utf-8")) if path and path.exists() else {}
        self.values: dict[str, dict[str, Any]] = known.get("cells", {})
        self._drawn: dict[Any, tuple[Prompts, Log]] = {}

    def fill(self, setting: str, name: str, seeds: list[int]) -> dict[str, Any]:
        """Computes the seeds that are not there yet; the cell."""
        world, arms = SETTINGS[setting]
        cell = self.values.setdefault(setting, {}).setdefault(name, {"learning_rate": None, "tuned": {}, "seeds": {}})
        if cell["learning_rate"] is None:
            for rate in LEARNING_RATES:
                found = self._trained(world, arms[name](), TUNING_SEEDS, rate, name)
                rewards = [each["reward"] for each in found.values()]
                cell["tuned"][str(rate)] = None if None in rewards else sum(rewards) / len(rewards)
            known = {rate: value for rate, value in cell["tuned"].items() if value is not None}
            cell["learning_rate"] = float(max(known, key=known.__getitem__)) if known else LEARNING_RATES[-1]
        if missing := [seed for seed in seeds if str(seed) not in cell["seeds"]]:
            cell["seeds"] |= self._trained(world, arms[name](), missing, cell["learning_rate"], name)
            if self.path:
                told = {"machine": machine.describe(), "kl": KL, "betas": BETAS, "cells": self.values}
                self.path.write_text(json.dumps(told) + "\n", encoding="utf-8")
        return cell

    def _trained(self, world: World, objective: Objective, seeds: list[int], rate: float, name: str) -> dict[str, Any]:
        key = (world, *seeds)
        if key not in self._drawn:
            self._drawn = {key: (make_prompts(world, seeds, True), draw_log(world, seeds))} | {
                old: drawn for old, drawn in self._drawn.items() if old[0] == world
            }
        held_out, log = self._drawn[key]
        frontier = look(held_out, train(log, objective, BETAS, rate, class_weights=name != _PLAIN))
        at = {figure: frontier.at(figure).tolist() for figure in FIGURES}
        found = {}
        for place, seed in enumerate(seeds):
            own = {figure: _rounded(values[place]) for figure, values in at.items()}
            curve = {
                what: [round(value, 4) for value in getattr(frontier, what)[place].tolist()]
                for what in ("kl", "reward")
            }
            found[str(seed)] = own | {"curve": curve}
        return found


def _rounded(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


def summary(cells: dict[str, dict[str, Any]], chosen: Iterable[int] = SEEDS) -> list[dict[str, Any]]:
    """Of each cell its figures at the KL, their paired differences to ``bco``, and where the least beta ends."""
    wanted = set(map(str, chosen))
    rows = []
    for setting, arms in cells.items():
        for name, cell in arms.items():
            if len(seeds := sorted(wanted & cell["seeds"].keys() & arms["bco"]["seeds"].keys())) < 2:
                continue
            own, base = ([arm["seeds"][seed] for seed in seeds] for arm in (cell, arms["bco"]))
            row: dict[str, Any] = {"setting": setting, "objective": name, "learning_rate": cell["learning_rate"]}
            for figure in FIGURES:
                values, others = (_column(each, figure) for each in (own, base))
                row[figure] = interval(values)
                row[f"{figure}_difference"] = interval(values - others)
            row["last_kl"] = sum(each["curve"]["kl"][-1] for each in own) / len(own)
            row["last_reward"] = sum(each["curve"]["reward"][-1] for each in own) / len(own)
            rows.append(row)
    return rows


def _column(seeds: list[dict[str, Any]], figure: str) -> torch.Tensor:
    return torch.tensor([math.nan if each[figure] is None else each[figure] for each in seeds], dtype=torch.float64)


def markdown(rows: list[dict[str, Any]], fresh: list[dict[str, Any]]) -> str:
    """Reward and tokens at the KL by setting and objective; then what else was tried, and how it differs from bco."""
    again = {(row["setting"], row["objective"]): row for row in fresh}
    lines = [f"| reward at KL {KL:g}, tokens | {' | '.join(EVERY)} |", "|---" * (1 + len(EVERY)) + "|"]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = {row["objective"]: row for row in rows if row["setting"] == setting}
        cells = [_cell(own[name]) if name in own else "" for name in EVERY]
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    lines += [
        "",
        "| setting | bco with | reward, tokens | less bco | less bco at equal length | both on fresh seeds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["objective"] not in EVERY:
            cells = [
                _cell(row),
                *_less(row),
                ", ".join(filter(None, _less(again.get((row["setting"], row["objective"]), {})))),
            ]
            lines.append(f"| {row['setting']} | {row['objective'].removeprefix('bco, ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _less(row: dict[str, Any]) -> list[str]:
    found = [row.get(name) for name in ("reward_difference", "reward_neutral_difference")]
    return [f"{each[0]:+.3f} ± {each[1]:.3f}" if each else "" for each in found]


def _cell(row: dict[str, Any]) -> str:
    if not row["reward"] or not row["tokens"]:
        return f"– (KL {row['last_kl']:.2f})"
    return f"{row['reward'][0]:.2f} ± {row['reward'][1]:.2f}, {row['tokens'][0]:.0f}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the differences to ``bco`` with their intervals, a panel for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure, panels = pyplot.subplots(3, 5, figsize=(19, 10), layout="constrained")
    for axes, setting in zip(panels.flat, settings, strict=False):
        own = [
            row for row in rows if row["setting"] == setting and row["objective"] != "bco" and row["reward_difference"]
        ]
        means, halves = zip(*(row["reward_difference"] for row in own), strict=True)
        axes.errorbar(means, range(len(own)), xerr=halves, fmt="o", color="#2b7bb9", capsize=3)
        axes.set_yticks(range(len(own)), [row["objective"].removeprefix("bco, ") for row in own], fontsize=8)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(setting, fontsize=10)
        axes.invert_yaxis()
    for axes in list(panels.flat)[len(settings) :]:
        axes.set_axis_off()
    figure.suptitle(f"Reward at KL {KL:g}, less that of bco: mean and 95 % interval of 10 seeds")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Computes what is missing, prints the table, draws."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="logs and prompts are drawn anew for each")
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--objectives", nargs="*", help="all of a setting if left out; bco is always among them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, cells, console = time.process_time(), Cells(RESULTS), Console(stderr=True)
    for setting in options.settings:
        for name in SETTINGS[setting][1]:
            if not options.objectives or name in ("bco", *options.objectives):
                cells.fill(setting, name, list(range(options.seeds)))
        if options.seeds == len(SEEDS) and (picked := PICKED & SETTINGS[setting][1].keys()):
            for name in ["bco", *(["dpo"] if "dpo" in SETTINGS[setting][1] else []), *sorted(picked)]:
                cells.fill(setting, name, [*SEEDS, *FRESH])
        console.print(f"{setting}: {time.process_time() - started:.0f} CPU seconds")
    rows = summary(cells.values)
    print(markdown(rows, summary(cells.values, FRESH)))
    draw(rows, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
