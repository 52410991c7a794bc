"""What is logged of importance weights at the start of a run, where, and by whom."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bco_lightning.callbacks import ImportanceMonitor
from bco_lightning.importance.trust_report import TrustReport
from tests.conftest import tiny_trainer
from tests.unit.test_trust_report import trust

DOWN_WEIGHTS = torch.tensor([0.5, 0.5, 1.0, 2.0])


def module(report: TrustReport | None, down_weights: torch.Tensor = DOWN_WEIGHTS) -> Any:
    importance = None if report is None else SimpleNamespace(report=report, down_weights=down_weights)
    return SimpleNamespace(importance=importance)


def logged(folder: Path, of: Any) -> tuple[Trainer, EventAccumulator]:
    trainer = tiny_trainer(logger=TensorBoardLogger(folder))
    ImportanceMonitor().on_fit_start(trainer, of)
    trainer.loggers[0].finalize("success")
    assert trainer.log_dir is not None
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    return trainer, events


def text_of(events: EventAccumulator, name: str) -> str:
    (value,) = events.Tensors(f"importance/{name}/text_summary")[0].tensor_proto.string_val
    return str(value, "utf-8")


def test_numbers_reach_tensorboard(tmp_path: Path) -> None:
    _, events = logged(tmp_path, module(trust()))
    scalars = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    expected = {"auc": 0.71, "log_loss": 0.51234, "constant_log_loss": 0.56234, "effective_share": 0.617, "mass": 1.04,
                "at_low": 0.011, "at_high": 0.022, "matched_auc": 0.52}  # fmt: skip
    assert scalars == {f"importance/{name}": pytest.approx(value) for name, value in expected.items()}


def test_the_histogram_is_that_of_the_weights(tmp_path: Path) -> None:
    _, events = logged(tmp_path, module(trust()))
    histogram = events.Histograms("importance/weights")[0].histogram_value
    assert (histogram.min, histogram.max, histogram.num, histogram.sum) == (0.5, 2.0, 4, 4.0)


def test_verdict_calibration_and_clusters_are_texts_of_tensorboard(tmp_path: Path) -> None:
    report = trust(mass=3.0)
    _, events = logged(tmp_path, module(report))
    assert report.verdict in text_of(events, "verdict")
    assert f"Warning: {report.warnings[0]}" in text_of(events, "verdict")
    calibration, clusters = (text_of(events, name).splitlines()[2:] for name in ("calibration", "clusters"))
    assert calibration == ["| 600 | 0.610 | 0.630 |", "| 600 | 0.890 | 0.870 |"]
    assert clusters == ["| 30 | 80.0% | 40.0% | 75.0% |", "| 70 | 20.0% | 60.0% | 25.0% |"]


def test_tables_of_tensorboard_have_as_many_cells_in_every_line(tmp_path: Path) -> None:
    _, events = logged(tmp_path, module(trust()))
    for name, columns in (("verdict", 2), ("calibration", 3), ("clusters", 4)):
        lines = [line for line in text_of(events, name).splitlines() if line.startswith("|")]
        assert {line.count("|") for line in lines} == {columns + 1}


def test_the_file_holds_the_report(tmp_path: Path) -> None:
    trainer, _ = logged(tmp_path, module(trust()))
    values = json.loads((Path(str(trainer.log_dir)) / "importance.json").read_text(encoding="utf-8"))
    assert values == trust().to_values()
    assert TrustReport.from_values(values) == trust()


def test_what_is_not_known_is_left_out_of_numbers_and_null_in_the_file(tmp_path: Path) -> None:
    unknown = TrustReport("reference", 3.0, 0.0, 3, 0, why_not="no thumbs-down rows")
    trainer, events = logged(tmp_path, module(unknown, torch.ones(0)))
    names = {tag.removeprefix("importance/") for tag in events.Tags()["scalars"]}
    assert names == {"effective_share", "mass", "at_low", "at_high"}
    assert "nan" not in text_of(events, "verdict")
    assert json.loads((Path(str(trainer.log_dir)) / "importance.json").read_text(encoding="utf-8"))["log_loss"] is None


def test_the_report_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged(tmp_path, module(trust()))
    assert "are worth 61.7% of their number" in " ".join(capsys.readouterr().out.split())


def test_other_loggers_get_the_numbers(tmp_path: Path) -> None:
    trainer = tiny_trainer(logger=CSVLogger(tmp_path))
    ImportanceMonitor().on_fit_start(trainer, module(trust()))
    trainer.loggers[0].save()
    assert "importance/effective_share" in (Path(str(trainer.log_dir)) / "metrics.csv").read_text(encoding="utf-8")


def test_nothing_happens_where_weights_are_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, events = logged(tmp_path, module(None))
    assert not any(events.Tags()[kind] for kind in ("scalars", "histograms", "tensors"))
    assert not list(tmp_path.rglob("importance.json"))
    assert capsys.readouterr().out == ""


def test_processes_other_than_the_first_write_nothing_but_ask_for_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    class Second:
        is_global_zero = False
        global_step = 0
        loggers = (TensorBoardLogger(tmp_path),)

        @property
        def log_dir(self) -> str:
            asked.append(True)  # all processes have to take part in the broadcast
            return str(tmp_path)

    ImportanceMonitor().on_fit_start(Second(), module(trust()))  # type: ignore[arg-type]
    assert asked == [True]
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""
