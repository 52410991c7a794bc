"""An optimizer step is the same however its rows are cut into micro-batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from bco_lightning import BCOModule
from tests.conftest import tiny_data, tiny_module, tiny_trainer, write_jsonl

CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]


class GradientRecorder(Callback):
    """Keeps the gradient that each optimizer step is about to apply."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: BCOModule, optimizer: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.requires_grad]).clone())


def run(tiny_model: str, log: str, batch_size: int, accumulation: int, num_steps: int) -> tuple[BCOModule, list]:
    recorder = GradientRecorder()
    module = tiny_module(tiny_model)
    trainer = tiny_trainer(max_steps=num_steps, accumulate_grad_batches=accumulation, callbacks=[recorder])
    trainer.fit(module, tiny_data(log, batch_size=batch_size, validation_fraction=0.0))
    assert trainer.global_step == num_steps == len(recorder.gradients)
    return module, recorder.gradients


@pytest.fixture
def nine_to_one(tmp_path: Path) -> str:
    """40 rows, 36 up and 4 down, so that many micro-batches and some steps see one class alone."""
    rows = [
        {"prompt": f"Question {n}?", "completion": "word " * (1 + n % 7) + str(n), "label": n % 10 != 0}
        for n in range(40)
    ]
    return write_jsonl(tmp_path / "nine_to_one.jsonl", rows)


def test_gradient_and_shift_do_not_depend_on_the_cut(tiny_model: str, nine_to_one: str) -> None:
    runs = [run(tiny_model, nine_to_one, size, accumulation, num_steps=4) for size, accumulation in CUTS]
    whole, gradients = runs[0]
    assert whole.reward_shift.value != 0
    for module, cut_gradients in runs[1:]:
        relative = float((cut_gradients[0] - gradients[0]).norm() / gradients[0].norm())
        assert relative < 1e-6
        assert module.reward_shift.value == pytest.approx(whole.reward_shift.value, rel=1e-4)
        # Later gradients follow weights that AdamW made from the earlier ones, which widens rounding.
        for cut, uncut in zip(cut_gradients, gradients, strict=True):
            assert float((cut - uncut).norm() / uncut.norm()) < 1e-3


def test_the_shift_after_a_step_is_the_midpoint_of_the_class_means_of_its_rows(
    tiny_model: str, nine_to_one: str
) -> None:
    seen: list[tuple[list[float], list[float]]] = []

    class Recorder(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: BCOModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            (rows,) = pl_module.step_rows
            seen.append((rows.rewards_B[rows.thumbs_up_B].tolist(), rows.rewards_B[~rows.thumbs_up_B].tolist()))

    module = tiny_module(tiny_model, reward_shift_decay=0.0)
    shifts: list[tuple[float, float]] = []

    class ShiftRecorder(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: BCOModule, *_: Any) -> None:
            shifts.append(pl_module.reward_shift.class_means)

    trainer = tiny_trainer(max_steps=5, callbacks=[Recorder(), ShiftRecorder()])
    trainer.fit(module, tiny_data(nine_to_one, batch_size=8, validation_fraction=0.0))
    shifts.append(module.reward_shift.class_means)

    assert any(not down for _, down in seen)  # so that a missing class is among the steps
    for (up, down), before, after in zip(seen, shifts, shifts[1:], strict=False):
        assert after[0] == pytest.approx(sum(up) / len(up) if up else before[0])
        assert after[1] == pytest.approx(sum(down) / len(down) if down else before[1])
    assert module.reward_shift.value == pytest.approx(sum(module.reward_shift.class_means) / 2)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny_model: str, nine_to_one: str) -> None:
    def weights(seed: int) -> torch.Tensor:
        module = tiny_module(tiny_model, seed=seed)
        tiny_trainer(max_steps=3).fit(module, tiny_data(nine_to_one, seed=seed))
        return torch.cat([p.flatten() for p in module.parameters() if p.requires_grad])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_every_logged_value_is_plain_json(tiny_model: str, nine_to_one: str) -> None:
    module = tiny_module(tiny_model)
    trainer = tiny_trainer(max_steps=2)
    trainer.fit(module, tiny_data(nine_to_one))
    json.dumps({name: float(value) for name, value in trainer.callback_metrics.items()})
