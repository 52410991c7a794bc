"""The recipes train: their settings are run on the tiny model, for a few steps, on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bco_lightning.checkpointing import read_checkpoint, saved_steps
from bco_lightning.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", ["lora", "full"])
def test_a_recipe_trains_from_zero_rewards(name: str, tiny_model: str, log: str) -> None:
    options = {
        "model.name_or_path": tiny_model,
        "model.learning_rate": "1e-3",
        "data.train_files": log,
        "trainer.accelerator": "cpu",
        "trainer.accumulate_grad_batches": "2",
        "trainer.max_steps": "3",
        "trainer.log_every_n_steps": "1",
    }
    assert main(["fit", f"--config={CONFIGS / f'{name}.yaml'}", *(f"--{k}={v}" for k, v in options.items())]) == 0
    run = Path("runs") / name / "version_0"
    events = EventAccumulator(str(run))
    events.Reload()
    margins = [event.value for event in events.Scalars("train/rewards/margins")]
    assert margins[0] == 0  # policy and reference round alike, under bfloat16 autocast too
    assert any(margins[1:])
    state = read_checkpoint(str(saved_steps(run / "checkpoints")[-1]))["state_dict"]
    assert all(value.dtype == torch.float32 for value in state.values())
