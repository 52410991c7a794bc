"""What a trainer may not be given: callbacks that would do harm or nothing, two where one belongs, odd numbers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

from lightning.pytorch import Callback, callbacks
from lightning.pytorch.callbacks import Checkpoint

from bco_lightning.callbacks.step_callback import StepCallback
from bco_lightning.errors import ConfigError
from bco_lightning.metrics import better
from bco_lightning.options import NOT_NEGATIVE, POSITIVE, at_least
from bco_lightning.parallel.strategy import FSDP2Strategy

_NUMBERS = {  # at which Lightning does not look
    "accumulate_grad_batches": at_least(1, "micro-batch"),
    "check_val_every_n_epoch": at_least(1, "epoch"),
    "val_check_interval": POSITIVE,
    "gradient_clip_val": NOT_NEGATIVE,
}
_KNOWING = ("bco_lightning", "lightning", "pytorch_lightning")  # whose callbacks log what is known
_Kind = TypeVar("_Kind", bound=Callback)
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
    data, many = getattr(getattr(trainer, "datamodule", None), "options", None), trainer.accumulate_grad_batches
    if data is not None and getattr(data, "tokens_per_micro_batch", None) and many > 1:
        problem = f"expected 1 with data.tokens_per_micro_batch, which cuts steps by itself; found {many}."
        raise ConfigError("trainer.accumulate_grad_batches", problem, f"Set data.batch_size: {many * data.batch_size}.")
    for name, (reason, remedy) in unfit.items():
        for callback in _given(trainer, getattr(callbacks, name)):
            found = type(callback).__name__
            raise ConfigError("trainer.callbacks", f"expected no {name}, found {found}: {reason}.", remedy)
    for kind in single:
        if (number := len(_given(trainer, kind))) > 1:
            remedy = "A subclass stands in place of ours; leave the others out."
            raise ConfigError("trainer.callbacks", f"expected one {kind.__name__}, found {number}.", remedy)


def names_logged(trainer: Any) -> list[str]:
    """Names that this package's callbacks will log, and others can monitor."""
    return [name for callback in _given(trainer, StepCallback) for name in callback.names_logged(trainer)]


def refuse_unknown_monitors(trainer: Any, module: Any) -> None:
    """Refuses names to monitor that nobody logs, before the first step, and the wrong direction of known ones.

    What callbacks or a module of others log is not known, and where there are some, any name may be right.
    """
    known = names_logged(trainer)
    held_out = [name for name in known if name.startswith("val/")]
    is_open = any(type(each).__module__.partition(".")[0] not in _KNOWING for each in (*trainer.callbacks, module))
    for callback in trainer.callbacks:
        if (name := getattr(callback, "monitor", None)) in (None, "auto"):
            continue
        own = isinstance(callback, Checkpoint) and not isinstance(callback, callbacks.ModelCheckpoint)
        where = "checkpoint.monitor" if own else f"trainer.callbacks, {type(callback).__name__}.monitor"
        fitting = held_out if own else known
        if name not in fitting and not is_open:
            shown = ", ".join(each for each in fitting if "by_source" not in each) or "none"
            remedy = "" if held_out else " No rows are held out: see data.validation_files and validation_fraction."
            meant = "".join(f"Did you mean {each}? " for each in difflib.get_close_matches(str(name), fitting, 1))
            problem = f"expected a name that is logged, found {name!r}."
            raise ConfigError(where, problem, f"{meant}Logged are {shown}.{remedy}")
        mode, right = getattr(callback, "mode", None), better(name)
        if (mode == "auto" and right is None) or (mode in ("max", "min") and right not in (None, mode)):
            expected = f"expected {right or 'max or min'} for {name}, found {mode}."
            remedy = "" if own else "Lightning's own choice is min."
            raise ConfigError(where.replace("monitor", "mode"), expected, remedy)
    if module.options.kl_budget is not None and not held_out:
        remedy = "Set data.validation_files or data.validation_fraction."
        raise ConfigError("model.kl_budget", "expected held-out rows to measure KL on, found none.", remedy)


def _given(trainer: Any, kind: type[_Kind]) -> list[_Kind]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]
