"""Binary Classifier Optimization: align language models from thumbs-up / thumbs-down feedback."""

from __future__ import annotations

import sys

# ``python -m`` looks for modules in the working folder first, where a yaml.py may lie beside a log from somebody else.
if (
    sys.argv[:1] == ["-m"]
    and not getattr(sys.flags, "safe_path", False)  # Python 3.11
    and any(word.removeprefix("-m").partition(".")[0] == __name__ for word in sys.orig_argv)
):
    del sys.path[0]

if sys.platform == "win32":
    raise ImportError("bco_lightning runs on Linux and macOS; on Windows, run it inside WSL 2.")

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bco_lightning.data import Columns, FeedbackDataModule, Rating, Source
    from bco_lightning.inspection.inspect import inspect_log
    from bco_lightning.inspection.run_record import RunRecord
    from bco_lightning.inspection.run_report import report_runs
    from bco_lightning.metrics import ImplicitRewardMetrics
    from bco_lightning.module import BCOModule
    from bco_lightning.objectives import RewardShift, bce_loss, bco_loss
    from bco_lightning.options import LoraSettings, PromptFeatures
    from bco_lightning.serving.export import export_checkpoint, load_aligned
    from bco_lightning.serving.score import score

__version__ = "0.1.0"

# Imported when first used, since torch and Lightning take seconds.
_HOMES = {
    "data": ("Columns", "FeedbackDataModule", "Rating", "Source"),
    "inspection.inspect": ("inspect_log",),
    "inspection.run_record": ("RunRecord",),
    "inspection.run_report": ("report_runs",),
    "metrics": ("ImplicitRewardMetrics",),
    "module": ("BCOModule",),
    "objectives": ("RewardShift", "bce_loss", "bco_loss"),
    "options": ("LoraSettings", "PromptFeatures"),
    "serving.export": ("export_checkpoint", "load_aligned"),
    "serving.score": ("score",),
}

__all__ = [
    "BCOModule", "Columns", "FeedbackDataModule", "ImplicitRewardMetrics", "LoraSettings", "PromptFeatures", "Rating",
    "RewardShift", "RunRecord", "Source", "bce_loss", "bco_loss", "export_checkpoint", "inspect_log", "load_aligned",
    "report_runs", "score",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"bco_lightning.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
