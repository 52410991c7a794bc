"""Two processes train a policy with its tower as one does, also where only one of them has images in a step."""

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
from tests.reliability.tiny_run import finish, start, tiny_fit, whole
from tests.unit.vision_models import image_bytes, saved


def run_all(model: str, log: str, folder: Path, strategy: str, vision_tower: bool) -> list[float]:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    module = BCOModule(
        model, lora=LoraSettings(r=2, alpha=4), vision_tower=vision_tower, dtype="float32", learning_rate=1e-2,
        cache_folder=str(folder / "cache"),
    )  # fmt: skip
    tiny_fit(
        "", log, module=module,
        trainer_options={"devices": processes, "strategy": named_strategy(strategy) if processes > 1 else "auto",
                         "max_steps": 4, "max_epochs": -1},
        data_options={"batch_size": 2 // processes, "max_length": 128},
    )  # fmt: skip
    trained = [each for _, each in sorted(module.named_parameters()) if each.requires_grad]
    return [module.reward_shift.value, *(float(whole(each.detach()).double().norm()) for each in trained)]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "vision_tower"), [("ddp", True), ("fsdp2", False)])
def test_two_processes_train_a_policy_that_sees_as_one_does(strategy: str, vision_tower: bool, tmp_path: Path) -> None:
    model = saved("llava", tmp_path / "model")
    (tmp_path / "a.png").write_bytes(image_bytes(0))
    image = {"type": "image", "path": "a.png"}
    rows: list[dict[str, Any]] = [
        {
            "prompt": [{"role": "user", "content": [*([image] if n % 2 else []), {"type": "text", "text": f"{n}?"}]}],
            "completion": f"Answer {n}.",
            "label": n % 3 == 0,
        }
        for n in range(12)
    ]
    run = partial(run_all, model, write_jsonl(tmp_path / "log.jsonl", rows), tmp_path, strategy, vision_tower)
    (one,) = finish(start(run, folder=tmp_path / "one"), tmp_path / "one")
    two = finish(start(run, ranks=2, folder=tmp_path / "two", environment=TORCHRUN), tmp_path / "two", timeout=300)
    for found in two:
        assert found == pytest.approx(one, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_tower_is_not_trained_where_weights_are_cut_up(tmp_path: Path) -> None:
    log = write_jsonl(tmp_path / "log.jsonl", [{"prompt": "a", "completion": "b", "label": up} for up in (True, False)])
    run = partial(run_all, saved("llava", tmp_path / "model"), log, tmp_path, "fsdp2", True)
    with pytest.raises(AssertionError, match=r"model\.vision_tower: expected false for weights that are cut up"):
        finish(start(run, ranks=2, folder=tmp_path / "two", environment=TORCHRUN), tmp_path / "two", timeout=300)
