"""Whatever logs a run: what is shown there, where to look, full disks, and folders of two runs that start at once."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bco_lightning.callbacks.loggers import goes_on_when_full, show, shows_figures, where_to_look
from bco_lightning.cli import safety
from bco_lightning.cli.app import main
from bco_lightning.cli.run import BCOCLI


def test_tensorboard_shows_figures_and_tables_and_csv_numbers_alone(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path / "a b", name="", version="v"), CSVLogger(tmp_path, name="", version="v")]
    show("figure", loggers, "picture", Figure((1, 1)), 3)
    show("table", loggers, "words", ("one", "two"), [("a|b", "c\nd")], 3)
    loggers[0].save()
    events = EventAccumulator(str(tmp_path / "a b" / "v")).Reload()
    assert [event.step for event in events.Images("picture")] == [3]
    text = events.Tensors("words/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "| one | two |\n| --- | --- |\n| a\\|b | c<br>d |"
    assert shows_figures(loggers)
    assert not shows_figures(loggers[1:])
    assert where_to_look(loggers) == [f"tensorboard --logdir '{tmp_path}/a b'", f"less {tmp_path}/v/metrics.csv"]


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_tensorboard(*_: Any, **__: Any) -> None:
    try:
        full()
    except OSError as error:
        raise ValueError("you have tried to log something that is not supported") from error


@pytest.mark.parametrize("write", [full, full_in_tensorboard])
@pytest.mark.parametrize("name", ["log_metrics", "log_hyperparams", "save", "finalize"])
def test_a_full_disk_costs_a_run_its_log_and_no_more(
    write: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = CSVLogger(tmp_path, name="", version="v")
    monkeypatch.setattr(logger, name, write)
    goes_on_when_full(logger)
    with pytest.warns(UserWarning, match="could not be written .No space left on device.; going on without it"):
        getattr(logger, name)({})
    assert not (tmp_path / "v").exists()


def unfit(*_: Any, **__: Any) -> None:
    raise ValueError("could not convert")


def test_another_error_of_a_logger_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = CSVLogger(tmp_path, name="", version="v")
    monkeypatch.setattr(logger, "log_metrics", unfit)
    goes_on_when_full(logger)
    with pytest.raises(ValueError, match="could not convert"):
        logger.log_metrics({})


def test_two_runs_that_start_at_once_have_csv_files_of_their_own(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="x"), CSVLogger(tmp_path, name="x")]
    assert [logger.version for logger in loggers] == [0, 0]  # what Lightning would write to
    options = {"save_dir": str(tmp_path), "name": "x", "version": None}
    found = []
    for logger in loggers:
        trainer: Any = SimpleNamespace(loggers=[logger], is_global_zero=True)
        cli: Any = SimpleNamespace(_claimed=[])
        BCOCLI._claim_csv_folders(cli, trainer, SimpleNamespace(init_args=SimpleNamespace(**options)))
        found += [Path(each.log_dir) for each in trainer.loggers]
        assert cli._claimed == found[-1:]
    assert found == [tmp_path / "x" / "version_0", tmp_path / "x" / "version_1"]


@pytest.mark.parametrize(
    ("address", "is_outside"),
    [
        ("sqlite:///mlflow.db", False),
        ("sqlite:///runs/mlflow.db", False),
        ("sqlite:////etc/mlflow.db", True),
        ("sqlite:///../mlflow.db", True),
        ("sqlite:///file:/etc/mlflow.db?uri=true", True),
        ("postgresql://host/mlflow", True),
    ],
)
def test_a_config_names_a_database_of_the_working_folder_and_none_outside(
    address: str, is_outside: bool, tmp_path: Path
) -> None:
    assert safety._leads_out(address, tmp_path) == is_outside


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "options", "look", "picture"),
    [
        (
            "wandb",
            ["WandbLogger", "--trainer.logger.project=bco", "--trainer.logger.offline=true"],
            "wandb sync wandb/offline-run-",
            "wandb/offline-run-*/files/media/images/held_out/rewards_*.png",
        ),
        (
            "sqlalchemy",  # which mlflow-skinny comes without
            ["MLFlowLogger", "--trainer.logger.tracking_uri=sqlite:///mlflow.db"],
            "mlflow ui --backend-store-uri sqlite:///mlflow.db",
            "mlruns/*/*/artifacts/held_out/rewards/step-00000006.png",
        ),
        (
            "trackio",
            ["bco_lightning.callbacks.TrackioLogger"],
            "trackio show --project bco_lightning",
            "trackio/media/bco_lightning/*/6/*.png",
        ),
    ],
)
def test_a_run_is_whole_whichever_logger_it_has(
    package: str, options: list[str], look: str, picture: str, tiny_model: str, log: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pytest.importorskip("mlflow" if package == "sqlalchemy" else package)
    pytest.importorskip(package)
    monkeypatch.setenv("TRACKIO_DIR", "trackio")
    arguments = [f"--model.name_or_path={tiny_model}", f"--data.train_files={log}", f"--data.validation_files={log}",
                 "--data.batch_size=4", "--trainer.max_steps=6", "--trainer.accelerator=cpu", "--model.lora.r=4",
                 "--samples.prompts=1", "--samples.max_new_tokens=3"]  # fmt: skip
    assert main(["fit", *arguments, f"--trainer.logger={options[0]}", *options[1:]]) == 0
    run = Path("runs/bco/version_0")
    assert {"config.yaml", "provenance.json", "metrics.jsonl", "held_out.json"} <= {path.name for path in run.iterdir()}
    printed = capsys.readouterr().out
    assert f"\n  {look}" in printed
    assert list(Path().glob(picture))
    assert main(["fit", f"--config={run / 'config.yaml'}", "--ckpt_path=last", "--trainer.max_steps=8"]) == 0
    assert (run / "checkpoints/step-00000008").exists()
