"""What a run says before its first step, tells loggers to compare it by, and prints of an evaluation."""

from __future__ import annotations

import io
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from bco_lightning.callbacks import RunCheckpoint, run_header
from bco_lightning.errors import LanguageModelError
from bco_lightning.inspection.run_report import print_metrics
from bco_lightning.metrics import ImplicitRewardMetrics
from bco_lightning.models.memory import PlanOptions, memory_of
from tests.conftest import tiny_data, tiny_module, tiny_trainer

METRICS = Path(__file__).parents[2] / "docs" / "reading_a_run.md"


def test_a_fit_says_once_what_it_trains_on_what_and_where(
    tiny_model: str, log: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    module = tiny_module(tiny_model)
    keeper = {"enable_checkpointing": True, "callbacks": [RunCheckpoint()], "default_root_dir": tmp_path}
    tiny_trainer(max_steps=1, **keeper).fit(module, tiny_data(log, validation_files=log))
    total = sum(each.numel() for each in module.policy.parameters())
    trained = sum(each.numel() for each in module.parameters() if each.requires_grad)
    share = f"{trained:,} of {total:,} parameters trained ({100 * trained / total:.2f}%)"
    for said in (
        f"policy: {tiny_model}, {share}, weights in torch.float32",
        "rows: 16 up and 8 down to train on; 16 up and 8 down held out; class weights: up 1.500, down 3.000",
        "steps: 1 optimizer steps of 4 rows, epochs: 0.167; rows of a micro-batch are packed",
        "device: 1 × cpu, precision 32-true",
        f"run: {tmp_path}",
    ):
        assert caplog.text.count(said) == 1, said
    told = re.findall(r"memory: about (\S+) GiB on each device at the peak of .* 4 rows of (\d+) tokens", caplog.text)
    [(gib, longest)] = told
    plan = PlanOptions(tiny_model, 1, "ddp", 4, "float32", "32-true", batch_size=4, max_length=int(longest))
    assert float(gib) == pytest.approx(sum(memory_of(plan, (1024, 4096)).values()) / 2**30, rel=0.06)


def test_memory_that_no_formula_knows_and_a_budget_that_cannot_stop_a_run_are_said(
    tiny_model: str, log: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise LanguageModelError("model", "expected decoder layers with q_proj, found others.")

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(run_header, "memory_of", refuse)
    with pytest.warns(UserWarning, match=r"model\.kl_budget: it is looked at once, when the run ends"):
        tiny_trainer(max_steps=1).fit(tiny_module(tiny_model, kl_budget=1.0), tiny_data(log, validation_fraction=0.3))
    assert "memory: not known for this kind of model" in caplog.text
    assert "run: nothing is written" in caplog.text


def test_hyper_parameters_of_two_runs_line_up_without_paths_beside_what_they_led_to(
    tiny_model: str, log: str, tmp_path: Path
) -> None:
    values = []
    other = {"lora": None, "class_weights": (1.0, 2.0), "kl_budget": 9.0}
    for name, options in (("a", {}), ("b", other)):
        logger = TensorBoardLogger(tmp_path, name="", version=name)
        trainer = tiny_trainer(max_steps=1, val_check_interval=1, logger=logger)
        trainer.fit(tiny_module(tiny_model, **options), tiny_data(log, validation_fraction=0.3))
        values.append(yaml.safe_load((tmp_path / name / "hparams.yaml").read_text()))
        events = EventAccumulator(str(tmp_path / name))
        events.Reload()
        told = {tag: HParamsPluginData.FromString(data) for tag, data in events.PluginTagToContent("hparams").items()}
        metrics = told["_hparams_/experiment"].experiment.metric_infos
        assert [metric.name.tag for metric in metrics] == ["val/auroc", "val/loss", "train/loss"]
        assert set(told["_hparams_/session_start_info"].session_start_info.hparams) == set(values[-1])
        assert "hp_metric" not in events.Tags()["scalars"]
        assert {event.step for event in events.Scalars("val/auroc")} == {1}  # nothing is made up
    first, second = values
    assert first.keys() == second.keys()
    assert len(first) < 30
    differing = {name for name in first if first[name] != second[name]}
    of_lora = {f"model.lora.{name}" for name in ("r", "alpha", "target_modules")}
    assert differing == of_lora | {"model.class_weights", "model.kl_budget"}
    assert first["model.name_or_path"] == Path(tiny_model).name
    assert not [value for value in first.values() if "/" in str(value)]


def test_an_evaluation_prints_four_digits_in_the_order_of_the_docs_and_sources_beside() -> None:
    names = [f"val/{name}" for name in ImplicitRewardMetrics(["a", "b"]).names]
    names.insert(1, "val/reward_shift")
    values: dict[str, Any] = {name: torch.tensor(number + 1 / 3) for number, name in enumerate(names)}
    values |= {"step": torch.tensor(4.0), "val/mine": torch.tensor(2.0)}
    values["val/by_source/a/loss"] = torch.tensor(math.nan)
    shown = io.StringIO()
    print_metrics(values, ["speed/rows_per_second", *names], Console(file=shown, width=100))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.getvalue().splitlines() if "│" in line]
    assert rows[0] == ["val/loss", "0.3333", "–", "29.3333"]
    assert rows[1] == ["val/reward_shift", "1.3333", "–", "–"]
    assert rows[-1] == ["val/mine", "2.0000", "–", "–"]
    table = METRICS.read_text(encoding="utf-8").partition("| metric in TensorBoard")[2].partition("`train/")[2]
    named = re.findall(r"`([a-z_]+)`", table.partition("`train/learning_rate`")[0])
    assert [row[0] for row in rows[:-1]] == [f"val/{name}" for name in named]
