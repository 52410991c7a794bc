"""Throughput: what is counted as work, what as time, and what both are measured against."""

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
from bco_lightning.callbacks import RunCheckpoint, ThroughputMonitor, throughput_monitor
from bco_lightning.callbacks.throughput_monitor import matmul_ceiling, peak_memory
from bco_lightning.models.language_model import load_policy
from bco_lightning.models.useful_flops import UsefulFlops
from tests.conftest import tiny_data, tiny_module, tiny_trainer

# The tiny model: hidden size 32, query width 32, keys and values 16, feed-forward 64, two layers.
LAYER = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64
CEILING = 1e6


@dataclass
class Batch:
    """Counts of three rows, two of which share a prompt of 4 tokens."""

    lengths: tuple[int, ...] = (10, 6, 8)
    num_computed: int = 20
    trunk_states_SH: None = None
    num_completion_tokens: int = 9

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)


class Run:
    """A run that takes the seconds it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layout: str = "packed", interval: int = 1) -> None:
        monkeypatch.setattr(throughput_monitor, "matmul_ceiling", lambda *_: CEILING)
        self.now, self.logged = 100.0, {}
        self.monitor = ThroughputMonitor(clock=lambda: self.now)
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            world_size=1,
            log_every_n_steps=interval,
            precision="32-true",
            strategy=SimpleNamespace(root_device=torch.device("cpu")),
            loggers=[SimpleNamespace(log_metrics=lambda values, step: self.logged.update({step: values}))],
        )
        self.bar: dict[str, float] = {}
        self.module: Any = SimpleNamespace(
            layout=layout,
            useful_flops=UsefulFlops(10, 100, 1),
            matmul_dtype=torch.float32,
            log=lambda name, value, **_: self.bar.update({name: value}),
        )
        self.monitor.on_train_start(self.trainer, self.module)

    def micro_batch(self, seconds: float, step_ends: bool = True) -> None:
        self.monitor.on_train_batch_start(self.trainer, self.module, Batch(), 0)
        self.now += seconds
        self.trainer.global_step += step_ends
        self.monitor.on_train_batch_end(self.trainer, self.module, None, Batch(), 0)  # type: ignore[arg-type]


def test_speed_is_what_a_hand_computation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.micro_batch(2.0)
    values = run.logged[1]
    assert values["speed/tokens_per_second"] == 24 / 2
    assert values["speed/rows_per_second"] == 3 / 2
    assert values["speed/padding_share"] == 0
    flops = 10 * 20 + 100 * 9 + (100 + 36 + 64) * 20 // 24
    assert values["speed/ceiling_share"] == pytest.approx(flops / 2 / CEILING)
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


def test_waiting_for_data_is_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.micro_batch(1.0)
    run.now += 2.0
    run.micro_batch(1.0)
    assert run.logged[2]["speed/rows_per_second"] == 3 / 3


@pytest.mark.parametrize("pause", ["on_validation_start", "on_save_checkpoint"])
def test_validation_and_checkpoints_are_no_training_time(pause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, interval=2)
    run.micro_batch(1.0)
    run.now += 0.5
    getattr(run.monitor, pause)(run.trainer, run.module, *([{}] if pause == "on_save_checkpoint" else []))
    run.now += 100.0
    run.micro_batch(1.0)
    assert run.logged[2]["speed/rows_per_second"] == 6 / 2.5


def test_tokens_of_all_processes_are_added_and_the_share_is_one_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.micro_batch(2.0)
    run.trainer.world_size = 2
    monkeypatch.setattr(throughput_monitor, "sum_over_ranks", lambda values, _: [2 * value for value in values])
    monkeypatch.setattr(throughput_monitor, "max_over_ranks", lambda values, _: [3 * value for value in values])
    run.micro_batch(2.0)
    alone, both = run.logged.values()
    assert both["speed/tokens_per_second"] == 2 * alone["speed/tokens_per_second"]
    assert both["speed/ceiling_share"] == pytest.approx(alone["speed/ceiling_share"])
    assert both["speed/peak_memory_gib"] == pytest.approx(3 * alone["speed/peak_memory_gib"], rel=0.1)


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


def test_the_ceiling_is_measured_once_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    first = matmul_ceiling(torch.device("cpu"), torch.float32)
    assert 1e8 < first < 1e15
    assert matmul_ceiling(torch.device("cpu"), torch.float32) == first
    assert torch.equal(torch.get_rng_state(), state)


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
        callbacks=[ThroughputMonitor(), RunCheckpoint(every_n_steps=2)],
    )
    trainer.fit(tiny_module(tiny_model), tiny_data(log, validation_fraction=0.3))
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    assert [event.step for event in events.Scalars("speed/tokens_per_second")] == [3, 6]
    shares = [event.value for event in events.Scalars("speed/ceiling_share")]
    assert all(0 < share < 1 for share in shares)
