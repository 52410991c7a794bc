"""A run's numbers in its own folder, whatever other loggers there are: ``report`` is made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from typing_extensions import override

from bco_lightning.errors import causes_of

METRICS_FILE = "metrics.jsonl"


class MetricsFile(Logger):
    """Appends a line of JSON for whatever is logged: ``step``, and numbers by name; ``null`` is not a finite number.

    A run that goes on appends to its file. Of two lines that hold a number for the same step, the later one counts.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)

    @property
    @override
    def name(self) -> str:
        return ""

    @property
    @override
    def version(self) -> str:
        return self.folder.name

    @property
    @override
    def save_dir(self) -> str:
        return str(self.folder)

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in ``config.yaml``."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        if not values or step is None:
            return
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with telling(file := self.folder / METRICS_FILE), file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, **plain}) + "\n")


@contextmanager
def telling(file: Path, makes_folder: bool = True) -> Iterator[None]:
    """Goes on with a word where a file, or what a logger has, cannot be written: training is worth more than that."""
    try:
        if makes_folder:
            file.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, ValueError) as error:  # Lightning makes a ValueError of whatever TensorBoard meets
        fault = next((cause for cause in causes_of(error) if isinstance(cause, OSError)), None)
        if fault is None:
            raise
        rank_zero_warn(f"{file}: could not be written ({fault.strerror}); going on without it.")
