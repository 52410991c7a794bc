"""How often processes talk to each other."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from bco_lightning.callbacks import SpeedMonitor
from tests.reliability.tiny_run import finish, make_log, make_model, start, tiny_fit

TALK = ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "broadcast_object_list", "barrier")


class Talk(Callback):
    """Counts the collectives of each optimizer step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of_step: dict[int, Counter[str]] = {}
        self._now: Counter[str] = Counter()
        for name in TALK:
            monkeypatch.setattr(torch.distributed, name, partial(self._called, name, getattr(torch.distributed, name)))

    def _called(self, name: str, original: Any, *arguments: Any, **named: Any) -> Any:
        self._now[name] += 1
        return original(*arguments, **named)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step not in self.of_step:
            self._now = self.of_step[trainer.global_step] = Counter()


def talk(model: str, log: str) -> dict[int, Counter[str]]:
    monkeypatch = pytest.MonkeyPatch()
    counted = Talk(monkeypatch)
    options = {"devices": 2, "strategy": "ddp", "max_steps": 10, "accumulate_grad_batches": 2, "log_every_n_steps": 5}
    tiny_fit(
        model,
        log,
        callbacks=[counted, SpeedMonitor()],
        trainer_options=options,
        data_options={"batch_size": 2},
        module_options={"reference_log_probs": "online"},  # else processes exchange what they have computed
    )
    monkeypatch.undo()
    return counted.of_step


def test_a_step_takes_one_collective_and_metrics_take_some_only_when_read(tmp_path: Path) -> None:
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl")
    one, other = finish(start(partial(talk, model, log), ranks=2, folder=tmp_path), tmp_path)
    assert one == other
    # Gradients are DDP's own affair.
    quiet = [step for step in range(1, 9) if step != 4]
    assert all(one[step] == Counter(all_reduce=1) for step in quiet), one
    assert one[4].total() > 1  # metrics are read after step 5
