"""The recipes train: their settings are run on the tiny model, for a few steps, on a CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bco_lightning.checkpoints import read_checkpoint, saved_steps
from bco_lightning.cli.app import main
from tests.reliability.tiny_run import finish, start

CONFIGS = Path(__file__).parents[2] / "configs"


def train(name: str, model: str, log: str, **more: str) -> int:
    options = {
        "model.name_or_path": model,
        "model.learning_rate": "1e-3",
        "data.train_files": log,
        "trainer.accelerator": "cpu",
        "trainer.accumulate_grad_batches": "2",
        "trainer.max_steps": "3",
        "trainer.log_every_n_steps": "1",
        **more,
    }
    return main(["fit", f"--config={CONFIGS / f'{name}.yaml'}", *(f"--{k}={v}" for k, v in options.items())])


@pytest.mark.parametrize(
    "name", ["lora", "full", "node_lora", "node_full", pytest.param("nodes_full", marks=pytest.mark.slow)]
)
def test_a_recipe_trains_from_zero_rewards(name: str, tiny_model: str, log: str, tmp_path: Path) -> None:
    if name.startswith("node"):
        two = {"trainer.devices": "2", "trainer.num_nodes": "1", "data.batch_size": "2"}
        processes = start(partial(train, name, tiny_model, log, **two), ranks=2, folder=tmp_path)
        assert finish(processes, tmp_path) == [0, 0]
    else:
        assert train(name, tiny_model, log) == 0
    run = Path("runs") / name / "version_0"
    events = EventAccumulator(str(run))
    events.Reload()
    margins = [event.value for event in events.Scalars("train/margin")]
    assert margins[0] == 0  # policy and reference round alike, under bfloat16 autocast too
    assert any(margins[1:])
    state = read_checkpoint(str(saved_steps(run / "checkpoints")[-1]))["state_dict"]
    assert all(value.dtype == torch.float32 for value in state.values())
