"""What a trainer may not be given: callbacks that would do harm or nothing, two where one belongs, odd numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, callbacks

from bco_lightning.errors import ConfigError
from bco_lightning.options import NOT_NEGATIVE, POSITIVE, at_least
from bco_lightning.parallel.strategy import FSDP2Strategy

_NUMBERS = {  # at which Lightning does not look
    "accumulate_grad_batches": at_least(1, "micro-batch"),
    "check_val_every_n_epoch": at_least(1, "epoch"),
    "val_check_interval": POSITIVE,
    "gradient_clip_val": NOT_NEGATIVE,
}
_TUNERS = "what it finds would reach neither optimizer nor data", "Compare short runs (trainer.max_steps: 20)."
_UNFIT = {
    "GradientAccumulationScheduler": (
        "the place in the data follows from the optimizer step, whose number of rows stays the same in a run",
        "Set trainer.accumulate_grad_batches.",
    ),
    "StochasticWeightAveraging": (
        "it averages at the ends of epochs, when the checkpoint that is exported is already written",
        "EMAWeightAveraging and WeightAveraging average steps.",
    ),
    "LearningRateFinder": _TUNERS,
    "BatchSizeFinder": _TUNERS,
    "ModelPruning": ("it renames weights, which checkpoints and exports then do not know", "Prune an exported model."),
    "BaseFinetuning": (
        "what is trained stays the same in a run, or it could not go on from a checkpoint",
        "model.lora.top_layers trains the last layers alone.",
    ),
}


def refuse_unfit(trainer: Any, single: Iterable[type[Callback]]) -> None:
    """Refuses numbers out of range, callbacks that would do harm or nothing, and two where a run has one."""
    for option, fits in _NUMBERS.items():
        if isinstance(value := getattr(trainer, option), (int, float)):
            fits.check(f"trainer.{option}", value)
    unfit = dict(_UNFIT)
    if isinstance(trainer.strategy, FSDP2Strategy):
        unfit["WeightAveraging"] = "it copies models that are whole on each device", "Use trainer.strategy: ddp."
    if trainer.world_size > 1:
        unfit["OnExceptionCheckpoint"] = (
            "after an error in one process the others would wait for it",
            "checkpoint.every_n_steps and every_minutes keep what was done.",
        )
    for name, (reason, remedy) in unfit.items():
        for callback in _given(trainer, getattr(callbacks, name)):
            found = type(callback).__name__
            raise ConfigError("trainer.callbacks", f"expected no {name}, found {found}: {reason}.", remedy)
    for kind in single:
        if (number := len(_given(trainer, kind))) > 1:
            remedy = "A subclass stands in place of ours; leave the others out."
            raise ConfigError("trainer.callbacks", f"expected one {kind.__name__}, found {number}.", remedy)


def _given(trainer: Any, kind: type[Callback]) -> list[Callback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]
