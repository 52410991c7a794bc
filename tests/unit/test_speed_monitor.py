"""Speed: what is counted as work, what as time, and what both are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from bco_lightning import LoraSettings
from bco_lightning.batch import StepSummary
from bco_lightning.callbacks import RunCheckpoint, SpeedMonitor, speed_monitor
from bco_lightning.callbacks.speed_monitor import peak_memory
from bco_lightning.models.load import load_policy
from bco_lightning.models.useful_flops import UsefulFlops
from tests.conftest import tiny_data, tiny_module, tiny_trainer

# The tiny model: hidden size 32, query width 32, keys and values 16, feed-forward 64, two layers.
LAYER = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64
PEAK = 1e6


@pytest.fixture(autouse=True)
def _known_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout stands for a policy that has it, except where a model is trained."""
    layout_of, of = speed_monitor.layout_of, UsefulFlops.of
    dtype_of = speed_monitor.dtype_of_matrices
    counted = UsefulFlops(10, 100, 1)
    monkeypatch.setattr(speed_monitor, "layout_of", lambda p: p if isinstance(p, str) else layout_of(p))
    monkeypatch.setattr(
        speed_monitor, "dtype_of_matrices", lambda p: torch.float32 if isinstance(p, str) else dtype_of(p)
    )
    monkeypatch.setattr(UsefulFlops, "of", lambda p: counted if isinstance(p, str) else of(p))


@dataclass
class Batch:
    """Counts of three rows, two of which share a prompt of 4 tokens."""

    lengths: tuple[int, ...] = (10, 6, 8)
    num_computed: int = 20
    num_completion_tokens: int = 9

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)


class Run:
    """A run that takes the seconds it is told to, in processes that all count the same."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, layout: str = "packed", interval: int = 1, ranks: int = 1
    ) -> None:
        monkeypatch.setattr(speed_monitor, "get_available_flops", lambda *_: PEAK)
        monkeypatch.setattr(speed_monitor, "max_over_ranks", lambda values, _: values)
        self.now, self.ranks, self.logged = 100.0, ranks, {}
        self.monitor = SpeedMonitor(clock=lambda: self.now)
        self.trainer: Any = SimpleNamespace(
            world_size=ranks,
            log_every_n_steps=interval,
            precision="32-true",
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            callback_metrics={},
            loggers=[SimpleNamespace(log_metrics=lambda values, step: self.logged.update({step: values}))],
        )
        self.bar: dict[str, float] = {}
        self.module: Any = SimpleNamespace(
            policy=layout,
            log=lambda name, value, **_: self.bar.update({name: value}),
        )
        self.step = 0
        self.monitor.on_train_start(self.trainer, self.module)

    def micro_batch(self, seconds: float, step_ends: bool = True) -> None:
        self.monitor.on_train_batch_start(self.trainer, self.module, Batch(), 0)  # type: ignore[arg-type]
        self.now += seconds
        if step_ends:
            self.step += 1
            own = self.monitor.numbers_of_step(self.trainer, self.module)
            totals = {name: self.ranks * float(value) for name, value in own.items()}
            self.monitor.on_step_end(self.trainer, self.module, StepSummary(self.step, (), 0.0, 0, 0, 0, 0, totals))


def test_speed_is_what_a_hand_computation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.micro_batch(2.0)
    values = run.logged[1]
    assert values["speed/tokens_per_second"] == 24 / 2
    assert values["speed/rows_per_second"] == 3 / 2
    assert values["speed/padding_share"] == 0
    flops = 10 * 20 + 100 * 9 + (100 + 36 + 64) * 20 // 24
    assert values["speed/mfu"] == pytest.approx(flops / 2 / PEAK)
    assert values["speed/peak_memory_gib"] > 0.01
    assert run.bar == {"tok/s": 12}


def test_padding_is_what_the_longest_row_makes_the_others_be(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, layout="padded")
    run.micro_batch(2.0)
    assert run.logged[1]["speed/padding_share"] == 6 / 30
    assert run.logged[1]["speed/tokens_per_second"] == 24 / 2


def test_values_are_those_of_the_steps_since_the_last_time(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, interval=2)
    for seconds in (1.0, 3.0, 2.0, 2.0, 1.0):
        run.micro_batch(seconds, step_ends=False)
        run.micro_batch(seconds)
    assert {step: values["speed/rows_per_second"] for step, values in run.logged.items()} == {2: 12 / 8, 4: 12 / 8}


def test_waiting_for_data_is_training_time_and_validation_and_checkpoints_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch)
    run.micro_batch(1.0)
    run.now += 2.0
    run.micro_batch(1.0)
    for pause in (run.monitor.on_validation_start, lambda *_: run.monitor.on_save_checkpoint(*_, {})):
        run.now += 0.5
        pause(run.trainer, run.module)
        run.now += 100.0
        run.micro_batch(1.0)
    assert [values["speed/rows_per_second"] for values in run.logged.values()] == [3 / 1, 3 / 3, 3 / 1.5, 3 / 1.5]


def test_counts_of_all_processes_are_added_and_the_share_is_one_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, both = Run(monkeypatch), Run(monkeypatch, ranks=2)
    for run in (alone, both):
        run.micro_batch(2.0)
    assert both.logged[1]["speed/tokens_per_second"] == 2 * alone.logged[1]["speed/tokens_per_second"]
    assert both.logged[1]["speed/mfu"] == pytest.approx(alone.logged[1]["speed/mfu"])


def test_full_fine_tuning_takes_six_operations_a_weight(tiny_model: str) -> None:
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    vocabulary = policy.config.vocab_size
    assert UsefulFlops.of(policy) == UsefulFlops(6 * 2 * LAYER, 6 * 32 * vocabulary, 6 * 2 * 32)


def test_adapters_of_the_top_layer_leave_the_layers_below_a_forward_pass(tiny_model: str) -> None:
    policy = load_policy(tiny_model, torch.float32, LoraSettings(r=4, top_layers=1), seed=0)
    adapters = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    flops = UsefulFlops.of(policy)
    assert flops.per_token == 2 * LAYER + 4 * LAYER + 6 * adapters
    assert flops.per_completion_token == 4 * 32 * policy.config.vocab_size
    assert flops.per_squared_length == (2 + 6) * 32


def test_adapters_of_all_layers_take_four_operations_a_weight(tiny_model: str) -> None:
    policy = load_policy(tiny_model, torch.float32, LoraSettings(r=4), seed=0)
    adapters = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert UsefulFlops.of(policy).per_token == 4 * 2 * LAYER + 6 * adapters


def test_peak_memory_holds_what_was_allocated_and_freed() -> None:
    torch.ones(2**26)
    assert peak_memory(torch.device("cpu")) > 4 * 2**26


def test_a_run_logs_its_speed_at_the_interval(tiny_model: str, log: str, tmp_path: Path) -> None:
    trainer = tiny_trainer(
        max_steps=6,
        logger=None,
        default_root_dir=tmp_path,
        log_every_n_steps=3,
        enable_checkpointing=True,
        callbacks=[SpeedMonitor(), RunCheckpoint(every_n_steps=2)],
    )
    trainer.fit(tiny_module(tiny_model), tiny_data(log, validation_fraction=0.3))
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    assert [event.step for event in events.Scalars("speed/tokens_per_second")] == [3, 6]
    assert all(event.value > 0 for event in events.Scalars("speed/rows_per_second"))
