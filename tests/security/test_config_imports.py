"""S4: a class path in a config or on the command line is looked up in a list before anything is imported."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bco_lightning import FeedbackDataModule
from bco_lightning.callbacks import FiniteGuard, RunCheckpoint
from bco_lightning.cli.app import main
from bco_lightning.cli.safety import ALLOWED_IMPORTS
from bco_lightning.data.options import DataOptions
from bco_lightning.demo.trial import KnownRewardTrial
from bco_lightning.options import ModelOptions
from tests.trials import Trials

HOSTILE = "hostile_package"
CLASS, FUNCTION = f"{HOSTILE}.Hostile", f"{HOSTILE}.function"
MODEL_AND_DATA = ["--model.name_or_path=nowhere", "--data.train_files=nowhere.jsonl"]
HIDDEN = "lightning.pytorch.callbacks.model_checkpoint.os.system"
LIST = "jsonargparse.set_parsing_settings"
DDP = "lightning.pytorch.strategies.DDPStrategy"
ADAPTED = "lightning.pytorch.callbacks.LambdaCallback"


def spec(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


# What it is, the config, and the name that the error must hold; None where there is no such option at all.
CONFIGS: list[tuple[str, dict[str, Any], str | None]] = [
    ("callback", {"trainer": {"callbacks": spec(CLASS)}}, CLASS),
    ("callback in a list", {"trainer": {"callbacks": [spec("EarlyStopping", monitor="x"), spec(CLASS)]}}, CLASS),
    ("callback by name alone", {"trainer": {"callbacks": [CLASS]}}, CLASS),
    ("logger", {"trainer": {"logger": spec(CLASS, name="x")}}, CLASS),
    ("logger in a list", {"trainer": {"logger": [spec(CLASS)]}}, CLASS),
    ("strategy", {"trainer": {"strategy": spec(CLASS)}}, CLASS),
    ("strategy by name alone", {"trainer": {"strategy": CLASS}}, CLASS),
    ("accelerator", {"trainer": {"accelerator": spec(CLASS)}}, CLASS),
    ("profiler", {"trainer": {"profiler": spec(CLASS)}}, CLASS),
    ("cluster environment", {"trainer": {"plugins": [spec(CLASS)]}}, CLASS),
    (
        "plugin in the arguments of a plugin",
        {"trainer": {"plugins": spec("lightning.pytorch.plugins.io.AsyncCheckpointIO", checkpoint_io=spec(CLASS))}},
        CLASS,
    ),
    ("plugin of a strategy", {"trainer": {"strategy": spec(DDP, checkpoint_io=spec(CLASS))}}, CLASS),
    ("cluster of a strategy", {"trainer": {"strategy": spec(DDP, cluster_environment=spec(CLASS))}}, CLASS),
    ("accelerator of a strategy", {"trainer": {"strategy": spec(DDP, accelerator=spec(CLASS))}}, CLASS),
    ("os.system as a callable", {"trainer": {"callbacks": spec(ADAPTED, on_fit_start="os.system")}}, "os.system"),
    ("a hostile callable", {"trainer": {"callbacks": spec(ADAPTED, on_fit_start=FUNCTION)}}, FUNCTION),
    ("a callable class", {"trainer": {"callbacks": spec(ADAPTED, on_fit_start=spec(CLASS))}}, CLASS),
    ("os behind an allowed name", {"trainer": {"callbacks": spec(HIDDEN)}}, "found posix.system"),
    ("a process", {"trainer": {"callbacks": spec("subprocess.Popen", args=["true"])}}, "subprocess.Popen"),
    ("the list itself", {"trainer": {"callbacks": spec(ADAPTED, setup=LIST)}}, LIST),
    ("adapter settings", {"model": {"lora": spec(CLASS)}}, CLASS),
    ("columns", {"data": {"columns": spec(CLASS)}}, CLASS),
    ("optimizer", {"optimizer": spec(CLASS)}, None),
    ("tokenizer", {"data": {"tokenizer": spec(CLASS)}}, None),
    ("the list named in the config", {"BCO_ALLOWED_IMPORTS": HOSTILE, "trainer": {"callbacks": spec(CLASS)}}, None),
    ("a config in a config", {"trainer": "sub.yaml"}, CLASS),
]  # fmt: skip

COMMANDS = [
    [f"--trainer.callbacks={CLASS}"],
    [f"--trainer.callbacks+={CLASS}"],
    ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=x", f"--trainer.callbacks+={CLASS}"],
    [f"--trainer.callbacks=[{{class_path: {CLASS}}}]"],
    ["--trainer.callbacks=" + ADAPTED, f"--trainer.callbacks.on_fit_start={FUNCTION}"],
    [f"--trainer.callbacks.help={CLASS}"],
    [f"--trainer.logger={CLASS}"],
    [f"--trainer.strategy={CLASS}"],
    [f"--trainer.profiler={CLASS}"],
    [f"--trainer.plugins+={CLASS}"],
    [f"--config={{trainer: {{callbacks: {{class_path: {CLASS}}}}}}}"],
    [f"--model.lora={CLASS}"],
]


@pytest.fixture(autouse=True)
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package on the path that leaves a file when it is imported."""
    marker = tmp_path / "marker"
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / f"{HOSTILE}.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "class Hostile(Callback):\n    pass\n"
        "def function(*_):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delenv("BCO_ALLOWED_IMPORTS", raising=False)
    yield marker
    sys.modules.pop(HOSTILE, None)


def exit_status(*arguments: str) -> int:
    try:
        return main(["fit", *MODEL_AND_DATA, *arguments])
    except SystemExit as exit_:
        return int(exit_.code or 0)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert exit_status(*arguments) == 2
    return capsys.readouterr().err


def assert_not_imported(marker: Path) -> None:
    assert not marker.exists()
    assert HOSTILE not in sys.modules


@pytest.mark.promise("S4", "a config imports nothing outside the list: refused before the import, the list is named")
def test_a_hostile_config_imports_nothing(trials: Trials, marker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sub.yaml").write_text(yaml.safe_dump({"callbacks": [spec(CLASS)]}))
    for trial in trials(CONFIGS, quick=8):
        with trial as (_, config, refused):
            Path("hostile.yaml").write_text(yaml.safe_dump(config))
            error = error_of(capsys, "--config=hostile.yaml")
            assert_not_imported(marker)
            if refused is not None:
                assert refused in error
                assert all(name in error for name in ALLOWED_IMPORTS)


@pytest.mark.promise("S4", "the command line imports nothing outside the list either")
def test_a_hostile_command_line_imports_nothing(
    trials: Trials, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for trial in trials(COMMANDS, quick=6):
        with trial as arguments:
            error = error_of(capsys, *arguments)
            assert_not_imported(marker)
            assert f"found {HOSTILE}." in error
            assert all(name in error for name in ALLOWED_IMPORTS)


def test_the_environment_allows_a_package_for_one_command(
    marker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BCO_ALLOWED_IMPORTS", f"another_package, {HOSTILE}")
    assert exit_status(f"--trainer.callbacks={CLASS}", "--print_config") == 0
    assert marker.exists()
    monkeypatch.delenv("BCO_ALLOWED_IMPORTS")
    assert f"found {CLASS}" in error_of(capsys, f"--trainer.callbacks={CLASS}", "--print_config")


@pytest.mark.parametrize("value", ["*", "not an/import", "jsonargparse"])
def test_the_environment_takes_import_paths_alone(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BCO_ALLOWED_IMPORTS", value)
    assert "BCO_ALLOWED_IMPORTS: expected import paths" in error_of(capsys, "--print_config")


def test_what_lightning_brings_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = {
        "callbacks": [
            spec("lightning.pytorch.callbacks.EarlyStopping", monitor="val/loss"),
            spec("LearningRateMonitor", logging_interval="step"),
            spec("bco_lightning.callbacks.StepProgressBar"),
        ],
        "logger": spec("lightning.pytorch.loggers.CSVLogger", save_dir="logs"),
        "strategy": spec("lightning.pytorch.strategies.DDPStrategy", find_unused_parameters=True),
        "profiler": spec("lightning.pytorch.profilers.SimpleProfiler"),
        "accelerator": spec("lightning.pytorch.accelerators.CPUAccelerator"),
        "plugins": [
            spec("lightning.pytorch.plugins.environments.LightningEnvironment"),
            spec("lightning.pytorch.plugins.io.TorchCheckpointIO"),
        ],
    }
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    assert exit_status("--config=config.yaml", "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert printed["strategy"]["class_path"] == "lightning.pytorch.strategies.DDPStrategy"
    Path("printed.yaml").write_text(yaml.safe_dump({"trainer": printed}))
    assert exit_status("--config=printed.yaml", "--print_config") == 0


@pytest.mark.parametrize("written", ["config", "command line"])
def test_settings_of_our_own_are_allowed(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text("model: {lora: {r: 4}}\ndata: {columns: {label: thumb}}\n")
    options = ["--config=config.yaml"] if written == "config" else ["--model.lora.r=4", "--data.columns.label=thumb"]
    assert exit_status(*options, "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["model"]["lora"]["r"], printed["data"]["columns"]["label"]) == (4, "thumb")


def unbounded(annotation: Any) -> bool:
    """Whether a value of any kind, or the name of any callable, would do."""
    if annotation in (Any, inspect.Parameter.empty, Callable, typing.Callable, type, object):
        return True
    return typing.get_origin(annotation) is Callable or any(unbounded(inner) for inner in typing.get_args(annotation))


@pytest.mark.parametrize(
    "options", [ModelOptions, DataOptions, *(kind.__init__ for kind in (RunCheckpoint, FiniteGuard, KnownRewardTrial))]
)
def test_no_option_takes_anything_or_any_callable(options: Any) -> None:
    hints = {name: hint for name, hint in typing.get_type_hints(options).items() if name not in ("tokenizer", "return")}
    assert hints
    assert not [name for name, hint in hints.items() if unbounded(hint)]


def test_the_tokenizer_can_be_given_from_python_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert "tokenizer" in inspect.signature(FeedbackDataModule).parameters
    assert exit_status("--help") == 0
    shown = capsys.readouterr().out
    assert "--data.columns" in shown
    assert "tokenizer " not in [line.strip() for line in shown.splitlines()]
    assert "--data.tokenizer" not in shown
