"""Trains the tiny model in each process of a group and writes what it ended with: run by torchrun, not by pytest."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.conftest import tiny_data, tiny_module, tiny_trainer


def main(model: str, log: str, output: str) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    module = tiny_module(model)
    trainer: Any = tiny_trainer(
        max_steps=5, devices=world_size, strategy="ddp" if world_size > 1 else "auto", accumulate_grad_batches=2
    )
    trainer.fit(module, tiny_data(log, batch_size=4 // world_size, validation_fraction=0.3))
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    weights = torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])
    result = {"shift": module.reward_shift.value, "weights": weights.tolist(), "values": values}
    Path(f"{output}.{os.environ['RANK']}").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
