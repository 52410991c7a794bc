"""Callbacks: what is logged, what is saved, and when."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import GenerationConfig

from bco_lightning import BCOModule, ImplicitRewardMetrics
from bco_lightning.callbacks import RunCheckpoint, SpeedMonitor
from bco_lightning.callbacks.loggers import METRICS_FILE, MetricsFile
from bco_lightning.callbacks.step_progress_bar import StepProgressBar
from bco_lightning.checkpoints.format import read_checkpoint
from bco_lightning.demo.trial import KnownRewardTrial
from bco_lightning.errors import ConfigError
from bco_lightning.models.generation import end_tokens, sample_completions
from tests.conftest import tiny_data, tiny_module, tiny_trainer


def test_every_metric_of_train_and_validation_reaches_tensorboard(tiny_model: str, log: str, tmp_path: Path) -> None:
    trainer = tiny_trainer(max_steps=6, logger=None, default_root_dir=tmp_path, log_every_n_steps=3)
    trainer.fit(tiny_module(tiny_model), tiny_data(log, validation_fraction=0.3))
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    tags = set(events.Tags()["scalars"])
    names = [*ImplicitRewardMetrics().compute(), "reward_shift"]
    assert {f"{stage}/{name}" for stage in ("train", "val") for name in names} <= tags
    assert [event.step for event in events.Scalars("train/loss")] == [1, 3, 6]
    assert events.Scalars("train/loss")[0].value == pytest.approx(2 * math.log(2), rel=0.5)


def test_what_a_progress_bar_shows_is_not_sent_to_the_device_to_be_waited_for(
    tiny_model: str, log: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(BCOModule, "log", lambda self, name, value, **how: told.update({name: value}))
    tiny_trainer(max_steps=1, callbacks=[SpeedMonitor()]).fit(tiny_module(tiny_model), tiny_data(log))
    assert told.keys() == {"loss", "delta", "margin", "tok/s"}
    assert all(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in told.values())


def test_checkpoints_are_saved_every_n_steps_and_at_the_end(tiny_model: str, log: str, tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(every_n_steps=2, keep=2)
    trainer = tiny_trainer(
        max_steps=7, enable_checkpointing=True, callbacks=[checkpoint], default_root_dir=tmp_path, logger=None
    )
    trainer.fit(tiny_module(tiny_model), tiny_data(log))
    folder = Path(trainer.log_dir) / "checkpoints"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000006", "step-00000007"]
    assert read_checkpoint(str(folder / "step-00000007"))["global_step"] == 7


def test_the_progress_bar_runs_over_the_steps_of_the_whole_run(
    tiny_model: str, log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny_trainer(max_epochs=2, enable_progress_bar=True, callbacks=[StepProgressBar()])
    trainer.fit(tiny_module(tiny_model), tiny_data(log, validation_fraction=0.0))
    last = capsys.readouterr().out.replace("\r", "\n").strip().splitlines()[-1]
    assert "12/12" in last
    for name in ("loss=", "delta=", "margin="):
        assert name in last


def test_a_sample_is_repeatable_and_leaves_the_random_state_alone(tiny_model: str) -> None:
    module = tiny_module(tiny_model)
    options: dict[str, Any] = {"max_new_tokens": 5, "seed": 3}
    state = torch.get_rng_state()
    prompts = module.tokenizer(["Hello", "A much longer prompt"])["input_ids"]
    first = sample_completions(module.policy, module.tokenizer, prompts, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert sample_completions(module.policy, module.tokenizer, prompts, **options) == first
    assert all(len(sample.token_ids) <= 5 for sample in first)


def test_samples_are_of_the_whole_distribution_whatever_the_generation_config_says(tiny_model: str) -> None:
    module = tiny_module(tiny_model)
    prompt = module.tokenizer("Hello")["input_ids"]
    with torch.no_grad():
        expected = module.policy(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    changed = {"repetition_penalty": 9.0, "top_k": 1, "temperature": 0.01, "suppress_tokens": list(range(9000))}
    module.policy.get_base_model().generation_config = GenerationConfig(**changed)
    drawn = sample_completions(module.policy, module.tokenizer, [prompt] * 500, max_new_tokens=1, seed=0)
    tokens = torch.tensor([sample.token_ids[0] for sample in drawn])
    for part in (torch.arange(len(expected)) < 9000, torch.arange(len(expected)) % 3 == 0):
        share = float(expected[part].sum())
        found = float(part[tokens].double().mean())
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / 500)
    assert module.policy.get_base_model().generation_config.top_k == 1


def test_a_sample_ends_at_each_end_token_that_the_model_names(tiny_model: str) -> None:
    module = tiny_module(tiny_model)
    ends = list(range(0, len(module.tokenizer), 2))
    module.policy.generation_config.eos_token_id = ends
    prompts = module.tokenizer(["Hello"] * 20)["input_ids"]
    for sample in sample_completions(module.policy, module.tokenizer, prompts, max_new_tokens=30, seed=0):
        assert [token in ends for token in sample.token_ids] == [False] * (len(sample.token_ids) - 1) + [True]
        assert sample.finished


def test_token_0_is_an_end_token_where_the_model_says_so(tiny_model: str) -> None:
    module = tiny_module(tiny_model)
    module.policy.generation_config.eos_token_id = 0
    assert end_tokens(module.policy, module.tokenizer) == [module.tokenizer.eos_token_id, 0]


def test_the_head_is_given_states_of_which_its_weight_is_not_copied_for_each_row(tiny_model: str) -> None:
    module, seen = tiny_module(tiny_model), []
    module.policy.get_output_embeddings().register_forward_hook(lambda *given: seen.append(given[1][0].is_contiguous()))
    prompts = module.tokenizer(["Hello, you there", "A much longer prompt"])["input_ids"]
    sample_completions(module.policy, module.tokenizer, prompts, max_new_tokens=2, seed=0)
    assert seen
    assert all(seen)


def test_the_trial_finds_no_difference_between_a_policy_and_itself(tiny_model: str) -> None:
    module = tiny_module(tiny_model)
    prompts = module.tokenizer(["One", "Two", "Three"])["input_ids"]
    result = KnownRewardTrial("tone", samples_per_prompt=2, max_new_tokens=4).compare(module, prompts)
    assert result.gain == result.kl == 0
    assert result.win_rate == 0.5
    assert result.verdict.startswith("NOT IMPROVED")


def test_the_trial_needs_held_out_rows(tiny_model: str, log: str) -> None:
    trainer = tiny_trainer(max_steps=1, callbacks=[KnownRewardTrial("tone")])
    with pytest.raises(ConfigError, match="held-out rows"):
        trainer.fit(tiny_module(tiny_model), tiny_data(log, validation_fraction=0.0))


def test_a_fit_of_a_module_from_a_checkpoint_logs_its_validations_at_its_own_steps(
    tiny_model: str, log: str, tmp_path: Path
) -> None:
    module = tiny_module(tiny_model)
    module.steps_before = 300  # as load_from_checkpoint leaves it
    data = tiny_data(log, validation_fraction=0.25)
    tiny_trainer(max_steps=4, val_check_interval=2, logger=MetricsFile(tmp_path)).fit(module, data)
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines if "val/loss" in line] == [2, 4]
