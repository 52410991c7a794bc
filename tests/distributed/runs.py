"""Short runs of the tiny model, many of them one after the other in one group of processes; pytest is not needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from bco_lightning import BCOModule, LoraSettings
from bco_lightning.callbacks import RunCheckpoint, SpeedMonitor
from bco_lightning.parallel.sharding import is_sharded
from bco_lightning.parallel.strategy import named_strategy
from tests.reliability.tiny_run import ROWS_PER_STEP, tiny_fit, whole


@dataclass(frozen=True)
class Case:
    """One short run; on any number of processes a step has the same rows."""

    strategy: str = "auto"
    lora: bool = False
    accumulation: int = 1
    online: bool = False
    precision: str = "32-true"
    dtype: str = "float32"
    checkpointing: bool = False
    stored: str = "float32"
    other_reference: bool = False
    tokens: int | None = None
    steps: int = 5

    def __str__(self) -> str:
        how = ["LoRA" if self.lora else "full", f"accumulation {self.accumulation}"]
        how += [word for word in ("online", "checkpointing", "other_reference") if getattr(self, word)]
        how += [f"{self.tokens} tokens"] if self.tokens else []
        how += [self.precision] if self.precision != "32-true" else []
        how += [f"{self.stored} as {self.dtype}"] if (self.stored, self.dtype) != ("float32", "float32") else []
        return " ".join([self.strategy, *how])


class Gradients(Callback):
    """Keeps the gradient of every optimizer step, whole, before it is clipped."""

    def __init__(self) -> None:
        self.of_step: list[dict[str, torch.Tensor]] = []
        self.shifts: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.of_step.append({name: whole(parameter.grad).clone() for name, parameter in trained.items()})
        self.shifts.append(module.reward_shift.value)


def run(
    case: Case, model: str, log: str, heldout: str, *, folder: Path, ckpt_path: str | None = None
) -> dict[str, Any]:
    """Trains, in as many processes as there are, and returns all that must not depend on their number."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    gradients = Gradients()
    module = BCOModule(
        f"{model}-{case.stored}",
        reference_name_or_path=f"{model}-other" if case.other_reference else None,
        lora=LoraSettings(r=4, alpha=8) if case.lora else None,
        learning_rate=1e-2,
        dtype=case.dtype,  # type: ignore[arg-type]
        reference_log_probs="online" if case.online else "auto",
        gradient_checkpointing=case.checkpointing,
    )
    saving = RunCheckpoint(every_n_steps=2, keep=5)
    saving.run_folder = str(folder)
    trainer_options: dict[str, Any] = {
        "devices": processes,
        "strategy": named_strategy(case.strategy),
        "precision": case.precision,
        "accumulate_grad_batches": case.accumulation,
        "max_steps": case.steps,
        "max_epochs": -1,
        "gradient_clip_val": 0.5,
        "log_every_n_steps": 1,
    }
    state = tiny_fit(
        "",
        log,
        module=module,
        callbacks=[gradients, saving, SpeedMonitor()],
        ckpt_path=ckpt_path,
        trainer_options=trainer_options,
        data_options={
            "batch_size": ROWS_PER_STEP // processes // case.accumulation,
            "tokens_per_micro_batch": case.tokens,
            "validation_files": heldout,
        },
    )
    trainer = module.trainer
    weights = {name: whole(value).clone() for name, value in trainer.strategy.lightning_module_state_dict().items()}
    moments = trainer.strategy.optimizer_state(trainer.optimizers[0])["state"]
    return {
        "weights": weights,
        "moments": {n: {key: whole(v).clone() for key, v in values.items()} for n, values in moments.items()},
        "gradients": gradients.of_step,
        "shifts": [*gradients.shifts, module.reward_shift.value],
        "class_weights": module.class_weights,
        "values": state["values"],
        "rows": state["rows"],
        "step": trainer.global_step,
        "own_reference": _how_it_is(module.reference.own_model),
    }


def _how_it_is(model: Any) -> str:
    if model is None:
        return "none"
    return "cut up" if is_sharded(model) else "whole"


def run_all(cases: list[Case], folder: Path, model: str, log: str, heldout: str) -> dict[str, Any]:
    """Runs cases one after the other in one group of processes; checkpoints go into a folder for each."""
    return {str(case): run(case, model, log, heldout, folder=folder / str(case)) for case in cases}


# What torchrun tells its processes; under Lightning's own launcher a process forgets its rank after one trainer.
TORCHRUN = {"TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


def go_on(
    cases: dict[tuple[str, str], Case], folder: Path, model: str, log: str, heldout: str
) -> dict[tuple[str, str], Any]:
    """Goes on from step 2 of runs to their end: ``{(name of the run that wrote, name of the journey): how}``."""
    return {
        (source, target): run(
            case,
            model,
            log,
            heldout,
            folder=folder / "journeys" / f"{source} to {target}",
            ckpt_path=str(folder / source / "checkpoints" / "step-00000002"),
        )
        for (source, target), case in cases.items()
    }
