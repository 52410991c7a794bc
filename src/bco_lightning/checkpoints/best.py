"""Which validated step of a run is the best, kept in a small file beside the steps, where every command finds it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bco_lightning.checkpoints.folders import step_folder, written_whole

BEST_FILE = "best.json"


@dataclass
class BestSteps:
    """Steps that were each the best so far when they were validated, the newest last; whoever goes back finds his."""

    monitor: str | None = None
    mode: str = "max"
    values: dict[int, float] = field(default_factory=dict)

    @classmethod
    def read(cls, checkpoints: Path) -> BestSteps:
        """What a run has written, as far as its folders are there; nothing where the file is none of ours."""
        try:
            told: dict[str, Any] = json.loads((checkpoints / BEST_FILE).read_bytes())
            values = {int(step): float(value) for step, value in told["steps"]}
            found = cls(str(told["monitor"]), str(told["mode"]), values)
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return cls()
        return found.among(lambda step: step_folder(checkpoints, step).is_dir())

    def write(self, checkpoints: Path) -> None:
        """Tells it to later starts and other commands."""
        told = {"monitor": self.monitor, "mode": self.mode, "steps": list(self.values.items())}
        with written_whole(checkpoints / BEST_FILE) as partial:
            partial.write_text(json.dumps(told) + "\n", encoding="utf-8")

    def among(self, holds: Callable[[int], bool]) -> BestSteps:
        """Those of the steps for which something holds."""
        return BestSteps(self.monitor, self.mode, {step: v for step, v in self.values.items() if holds(step)})

    @property
    def step(self) -> int | None:
        """The best of them."""
        return max(self.values, default=None)

    def is_beaten_by(self, value: float) -> bool:
        """Whether a value is better; one that is equal comes too late, and NaN never is."""
        sign = 1 if self.mode == "max" else -1
        return not math.isnan(value) and (self.step is None or sign * value > sign * self.values[self.step])
