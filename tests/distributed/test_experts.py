"""Two processes balance the experts of a mixture as one does, whole or cut up."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bco_lightning import BCOModule, LoraSettings
from bco_lightning.parallel.strategy import named_strategy
from tests.conftest import write_jsonl
from tests.distributed.runs import TORCHRUN
from tests.reliability.tiny_run import finish, start, tiny_fit
from tests.unit.test_experts import save_mixture

CASES: dict[str, dict[str, Any]] = {
    "ddp": {}, "fsdp2": {}, "ddp, adapters": {"lora": LoraSettings(r=2), "train_router": True},
    "fsdp2, frozen": {"train_router": False, "gradient_checkpointing": True},
}  # fmt: skip
NAMES = ("router_aux_loss", "expert_load_max", "expert_entropy", "gradient_norm", "loss")


def run_all(model: str, log: str, folder: Path) -> dict[str, Any]:
    processes, found = int(os.environ.get("WORLD_SIZE", "1")), {}
    for name, options in CASES.items():
        module = BCOModule(model, router_aux_loss=1.0, dtype="float32", cache_folder=str(folder), **options)
        strategy = named_strategy(name.partition(",")[0]) if processes > 1 else "auto"
        trainer = {"devices": processes, "strategy": strategy, "max_steps": 3, "max_epochs": -1, "log_every_n_steps": 1}
        data = {"batch_size": 8 // processes}
        values = tiny_fit("", log, module=module, trainer_options=trainer, data_options=data)["values"]
        found[name] = {key: value for key, value in values[max(values)].items() if key.removeprefix("train/") in NAMES}
    return found


@pytest.mark.slow
def test_two_processes_balance_experts_as_one_does(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "completion": "word " * (1 + n % 5), "label": n % 3 > 0} for n in range(32)]
    run = partial(run_all, save_mixture(tmp_path / "model"), write_jsonl(tmp_path / "log.jsonl", rows), tmp_path)
    (one,) = finish(start(run, folder=tmp_path / "one"), tmp_path / "one", timeout=600)
    for found in finish(start(run, ranks=2, folder=tmp_path / "two", environment=TORCHRUN), tmp_path / "two", 900):
        for name in CASES:
            assert len(found[name]) == len(NAMES), found[name]
            assert found[name] == pytest.approx(one[name], rel=1e-3), name
