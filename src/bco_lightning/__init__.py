"""Binary Classifier Optimization: align language models from thumbs-up / thumbs-down feedback."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bco_lightning.data import FeedbackDataModule, Rating, Source
    from bco_lightning.export import export_checkpoint, load_aligned
    from bco_lightning.metrics import ImplicitRewardMetrics
    from bco_lightning.module import BCOModule
    from bco_lightning.objectives import RewardShift, bce_loss, bco_loss
    from bco_lightning.options import LoraSettings, PromptFeatures

__version__ = "0.1.0"

# Imported when first used, since torch and Lightning take seconds.
_HOMES = {
    "BCOModule": "bco_lightning.module",
    "FeedbackDataModule": "bco_lightning.data",
    "ImplicitRewardMetrics": "bco_lightning.metrics",
    "LoraSettings": "bco_lightning.options",
    "PromptFeatures": "bco_lightning.options",
    "Rating": "bco_lightning.data",
    "RewardShift": "bco_lightning.objectives",
    "Source": "bco_lightning.data",
    "bce_loss": "bco_lightning.objectives",
    "bco_loss": "bco_lightning.objectives",
    "export_checkpoint": "bco_lightning.export",
    "load_aligned": "bco_lightning.export",
}

__all__ = [
    "BCOModule",
    "FeedbackDataModule",
    "ImplicitRewardMetrics",
    "LoraSettings",
    "PromptFeatures",
    "Rating",
    "RewardShift",
    "Source",
    "bce_loss",
    "bco_loss",
    "export_checkpoint",
    "load_aligned",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
