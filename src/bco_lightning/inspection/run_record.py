"""What a run left in its folder, as numbers: curves, held-out rows, samples, settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from bco_lightning.callbacks.held_out_rows import HeldOut
from bco_lightning.callbacks.loggers import METRICS_FILE, SAMPLES_FILE
from bco_lightning.errors import ConfigError
from bco_lightning.importance.report import interval

_FEWEST_ROWS = 20  # of the rarer class
_AT_FIRST = {"loss": 2 * math.log(2), "auroc": 0.5, "accuracy": 0.5, "margin": 0.0, "kl": 0.0}
Points = Sequence[tuple[int, float]]


class Outcome(NamedTuple):
    """One sentence on what a run achieved, by the rows that it has not seen."""

    level: str  # better, worse, none, unknown
    text: str


@dataclass(frozen=True)
class RunRecord:
    """A run's folder, read."""

    folder: Path
    curves: Mapping[str, Points]  # by the name that was logged
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    held_out: HeldOut | None = None
    samples: Sequence[Mapping[str, Any]] = ()
    alignment: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Reads what is there; a line that was cut off when a run was killed is passed over.

        Raises:
            ConfigError: If the folder holds no metrics.
        """
        if not (folder / METRICS_FILE).is_file():
            expected = f"expected the folder of a run, with {METRICS_FILE} in it, found none."
            raise ConfigError(str(folder), expected, "Give a folder version_N of a run_folder.")
        curves: dict[str, dict[int, float]] = {}
        for line in _lines(folder / METRICS_FILE):
            for name, value in line.items():
                if name != "step":  # of a run that went on from an earlier step, the newer value counts
                    curves.setdefault(name, {})[line["step"]] = math.nan if value is None else value
        return cls(
            folder,
            {name: sorted(points.items()) for name, points in curves.items()},
            _values(folder / "config.yaml"),
            _values(folder / "provenance.json"),
            HeldOut.read(folder),
            # A validation that a stop has cut is made again.
            list(
                {
                    (each["step"], each.get("number", at)): each
                    for at, each in enumerate(_lines(folder / SAMPLES_FILE))
                }.values()
            ),
            _values(folder / "alignment.json") or None,
        )

    def last(self, name: str) -> float | None:
        """The newest value that was logged under a name."""
        points = self.curves.get(name)
        return points[-1][1] if points else None

    @property
    def steps(self) -> int:
        """The newest optimizer step of which anything is known."""
        return max((points[-1][0] for points in self.curves.values()), default=0)

    @property
    def newest_samples(self) -> list[Mapping[str, Any]]:
        """Those of the newest step."""
        newest = max((sample["step"] for sample in self.samples), default=None)
        return [sample for sample in self.samples if sample["step"] == newest]

    def at_first(self, name: str) -> float | None:
        """What a metric of held-out rows is before the first step, where the reference is the policy itself."""
        model, one_class = self.settings.get("model", {}), self.held_out is not None and not self.held_out.num_rarer
        if name.startswith("length"):
            return self.last(f"val/{name}")
        unknown = name == "loss" and (one_class or model.get("objective", "bco") not in ("bco", "bce"))
        return None if unknown or model.get("reference_name_or_path") is not None else _AT_FIRST.get(name)

    @cached_property
    def outcome(self) -> Outcome:
        """Better, worse, no better, or too few rows to tell: whether held-out thumbs are told apart."""
        held_out = self.held_out
        if held_out is None:
            return Outcome(
                "unknown", "Not measured: no rows were held out or looked at, or their rewards are not finite."
            )
        if (area := held_out.area) is None or held_out.num_rarer < _FEWEST_ROWS:
            few = f"the rarer class has {held_out.num_rarer} of {len(held_out.rewards)} held-out rows"
            return Outcome("unknown", f"Too few rows to tell: {few}, and {_FEWEST_ROWS} are the least to judge by.")
        chance = f"a held-out thumbs-up answer is rewarded above a thumbs-down one with probability {interval(area)}"
        if area.low <= 0.5 <= area.high:
            return Outcome("none", f"No better than before, as far as can be told: {chance}, and 0.5 is within.")
        level = "better" if area.low > 0.5 else "worse"
        return Outcome(level, f"{level.capitalize()} than before: {chance}; before training it was 0.5.")


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        with suppress(ValueError):  # it was cut off
            found.append(json.loads(line))
    return [value for value in found if isinstance(value, dict) and isinstance(value.get("step"), int)]


def _values(path: Path) -> dict[str, Any]:
    """What a file of the run's folder holds, JSON or YAML; nothing if there is none."""
    value = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return value if isinstance(value, dict) else {}
