"""S10: a config file names no place outside the working directory to write to; the command line may."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.cli.app import main
from bco_lightning.errors import ConfigError
from bco_lightning.places import resolve_packaged
from tests.reliability.tiny_run import make_log, make_model
from tests.trials import Trials

LOGGER = "lightning.pytorch.loggers.CSVLogger"
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"
# OUTSIDE stands for a folder beside the working directory; `link` is a link to it, `inner/link` too.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "run folder, absolute": ({"run_folder": "OUTSIDE/runs"}, "run_folder"),
    "run folder, climbing": ({"run_folder": "../outside/runs"}, "run_folder"),
    "run folder, climbing after a folder": ({"run_folder": "runs/../../outside"}, "run_folder"),
    "run folder, by a link": ({"run_folder": "link/runs"}, "run_folder"),
    "run folder, by a link further down": ({"run_folder": "inner/link/runs"}, "run_folder"),
    "run folder, by a variable": ({"run_folder": "$OUTSIDE/runs"}, "run_folder"),
    "run folder, in the home folder": ({"run_folder": "~/runs"}, "run_folder"),
    "default folder of the trainer": ({"trainer": {"default_root_dir": "OUTSIDE"}}, "trainer.default_root_dir"),
    "folder of a logger": (
        {"trainer": {"logger": {"class_path": LOGGER, "init_args": {"save_dir": "OUTSIDE"}}}},
        "trainer.logger.save_dir",
    ),
    "run name of a logger": (
        {"trainer": {"logger": {"class_path": LOGGER, "init_args": {"save_dir": "x", "name": "../../outside/x"}}}},
        "trainer.logger.name",
    ),
    "folder of a callback": (
        {"trainer": {"callbacks": [{"class_path": CHECKPOINT, "init_args": {"dirpath": "OUTSIDE"}}]}},
        "trainer.callbacks.dirpath",
    ),
    "file name of a callback": (
        {"trainer": {"callbacks": [{"class_path": CHECKPOINT, "init_args": {"filename": "../../../outside/x"}}]}},
        "trainer.callbacks.filename",
    ),
    "folder of a profiler": (
        {
            "trainer": {
                "profiler": {
                    "class_path": "lightning.pytorch.profilers.SimpleProfiler",
                    "init_args": {"dirpath": "OUTSIDE", "filename": "x"},
                }
            }
        },
        "trainer.profiler.dirpath",
    ),
    "predictions, absolute": ({"predictions": {"path": "OUTSIDE/scores.jsonl"}}, "predictions.path"),
    "predictions, climbing": ({"predictions": {"path": "../outside/keep.txt"}}, "predictions.path"),
    "a URL": ({"trainer": {"default_root_dir": "memory://runs"}}, "trainer.default_root_dir"),
    "in a config of the trainer": ({"trainer": "inner/trainer.yaml"}, "trainer.default_root_dir"),
}


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a folder beside it that nothing may be written to."""
    outside, root = tmp_path / "outside", tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    outside.mkdir()
    (outside / "keep.txt").write_text("untouched")
    for link in (root / "link", root / "inner/link"):
        link.symlink_to(outside)
    (root / "inner/trainer.yaml").write_text(f"default_root_dir: {outside}\n")
    monkeypatch.chdir(root)
    monkeypatch.setenv("OUTSIDE", str(outside))
    monkeypatch.setenv("HOME", str(outside))
    return outside


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def options(model: str, log: str) -> list[str]:
    return [
        f"--model.name_or_path={model}",
        f"--data.train_files={log}",
        "--data.max_length=96",
        "--trainer.max_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]


def write_config(config: dict[str, Any], outside: Path) -> None:
    Path("config.yaml").write_text(
        yaml.safe_dump(config).replace("OUTSIDE", str(outside)).replace(f"${outside}", "$OUTSIDE")
    )


@pytest.mark.promise(
    "S10", "a config file writes nothing outside the working directory; the outside stays byte for byte"
)
def test_a_config_cannot_write_outside(
    trials: Trials, outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl")
    before = snapshot(outside)
    for trial in trials(list(CASES), quick=5):
        with trial as name:
            config, option = CASES[name]
            write_config(config, outside)
            command = "predict" if option.startswith("predictions") else "fit"
            status = main([command, "--config=config.yaml", *options(model, log), f"--data.predict_files={log}"])
            error = capsys.readouterr().err
            assert snapshot(outside) == before
            assert status == 2
            assert f"error: {option}: expected a place inside the working directory" in error, error[-300:]
            assert f"give this one on the command line: --{option}=" in error
            assert not Path("runs").exists()


@pytest.mark.promise("S10", "the person at the keyboard may write anywhere, also over what a config says")
def test_the_command_line_may_write_anywhere(trials: Trials, outside: Path, tmp_path: Path) -> None:
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl")
    cases = [
        ("run_folder", [f"--run_folder={outside}/runs"]),
        ("run_folder", ["--run_folder", f"{outside}/runs"]),
        ("trainer.logger.save_dir", [f"--trainer.logger={LOGGER}", f"--trainer.logger.save_dir={outside}/csv"]),
        (
            "trainer.logger.save_dir",
            [f"--trainer.logger={{class_path: {LOGGER}, init_args: {{save_dir: {outside}/csv}}}}"],
        ),
    ]
    for trial in trials(cases, quick=2):
        with trial as (option, arguments):
            if option == "run_folder":
                Path("config.yaml").write_text("run_folder: /nowhere/else\n")
            else:
                Path("config.yaml").write_text("{}\n")
            assert main(["fit", "--config=config.yaml", *options(model, log), *arguments, "--trainer.max_steps=1"]) == 0
            assert len(snapshot(outside)) > 1


def test_the_config_of_a_run_that_went_outside_asks_for_the_option_again(
    outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl")
    there = f"--run_folder={outside}/runs"
    assert main(["fit", *options(model, log), there]) == 0
    (config,) = outside.glob("runs/version_0/config.yaml")
    assert main(["fit", f"--config={config}"]) == 2
    assert f"give this one on the command line: {there}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["fit", f"--config={config}", there, "--print_config"])


def test_a_place_that_another_option_names_on_the_command_line_is_not_allowed_by_it(
    outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = make_log(outside / "log.jsonl")
    before = snapshot(outside)
    write_config({"predictions": {"path": log}}, outside)
    assert main(["predict", "--config=config.yaml", "--model.name_or_path=x", f"--data.predict_files={log}"]) == 2
    assert "predictions.path: expected a place inside" in capsys.readouterr().err
    assert snapshot(outside) == before


def test_places_inside_are_allowed_however_they_are_written(outside: Path) -> None:
    config = {"run_folder": str(Path.cwd() / "runs"), "predictions": {"path": "scores/a.jsonl"}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as caught:
        main(["predict", "--config=config.yaml", "--model.name_or_path=x", "--print_config"])
    assert caught.value.code == 0


def test_an_export_takes_its_folder_from_the_command_line_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text("output_dir: /nowhere/else\nckpt_path: x\n")
    assert main(["export", "--config=config.yaml"]) == 2
    assert "--config" in capsys.readouterr().err
    assert not Path("/nowhere").exists()


@pytest.mark.parametrize(
    "name", ["package:bco_lightning/../../etc", "package:../etc", "package:bco_lightning//etc/passwd"]
)
def test_a_packaged_name_stays_in_its_package(name: str) -> None:
    with pytest.raises(ConfigError):
        resolve_packaged(name)


PAGE = '<!doctype html>\n<html data-made-by="bco_lightning inspect" lang="en">an earlier page'
PREDICT, INSPECT = ("predict", "--data.predict_files=log.jsonl"), ("inspect", "--data.train_files=log.jsonl")
TAKEN = ("log.jsonl", "link.jsonl", "dangling", "folder", "page.html", "log.jsonl/below", "long" * 80, ".", "/")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((PREDICT, f"--predictions.path={name}") for name in TAKEN),
        *((INSPECT, f"--report={name}") for name in TAKEN),
        ((*INSPECT, "--overwrite"), "--report=log.jsonl"),
        ((*INSPECT, "--overwrite"), "--report=link.html"),
        ((*INSPECT, "--config=config.yaml"), "--examples=1"),
        ((*PREDICT, "--config=config.yaml"), "--seed_everything=1"),
        *((("export", "--ckpt_path=none"), f"--output_dir={name}") for name in TAKEN),
    ],
)
def test_no_command_replaces_what_is_there_and_says_so_before_any_work(
    command: tuple[str, ...],
    option: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file, text in {"log.jsonl": "rows", "page.html": PAGE, "folder/train.jsonl": "rows"}.items():
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).write_text(text)
    for link, to in {"link.jsonl": "log.jsonl", "link.html": "page.html", "dangling": "gone"}.items():
        Path(link).symlink_to(to)
    Path("config.yaml").write_text("predictions: {path: README}\n" if command[0] == "predict" else "report: README\n")
    Path("README").write_text("mine")
    before = snapshot(tmp_path)
    named = [] if command[0] == "export" else ["--model.name_or_path=none"]  # which would be missed a moment later
    assert main([*command, *named, option]) == 2
    said = capsys.readouterr().err
    assert ": expected a name to write under that is free" in said, said
    assert "Traceback" not in said
    assert snapshot(tmp_path) == before


def test_a_page_is_replaced_by_its_own_command_where_the_user_says_so(tmp_path: Path) -> None:
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl")
    inspect = ["inspect", *options(model, log)]
    assert main(inspect) == 0
    Path("inspect.html").write_text(Path("inspect.html").read_text().replace("Data report", "Yesterday"))
    assert main(inspect) == 2
    assert main([*inspect, "--overwrite"]) == 0
    assert "Yesterday" not in Path("inspect.html").read_text()


@pytest.mark.parametrize("name", ["metrics.csv", "hparams.yaml"])
def test_a_logger_of_a_config_replaces_no_file_either(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_text("mine")
    place = {"save_dir": ".", "name": "", "version": ""}
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": {"logger": {"class_path": LOGGER, "init_args": place}}}))
    assert main(["fit", "--config=config.yaml", *options("none", "none.jsonl")]) == 2
    assert "error: trainer.logger: expected a name to write under that is free" in capsys.readouterr().err
    assert Path(name).read_text() == "mine"


def test_what_comes_while_a_command_works_is_not_replaced_either(tmp_path: Path) -> None:
    for target, make in ((tmp_path / "file", Path.touch), (tmp_path / "folder", Path.mkdir)):

        def write(target: Path = target, make: Callable[[Path], None] = make) -> None:
            with written_whole(target, replaces=False) as partial:
                make(partial)
                target.write_text("of another")

        with pytest.raises(FileExistsError):
            write()
        assert target.read_text() == "of another"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_predictions_are_not_written_through_a_link(outside: Path, tmp_path: Path) -> None:
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl")
    Path(f".scores.jsonl.partial-{os.getpid()}").symlink_to(outside / "keep.txt")
    before = snapshot(outside)
    arguments = ["--predictions.path=scores.jsonl", f"--data.predict_files={log}"]
    assert main(["predict", *options(model, log), *arguments]) == 0
    assert snapshot(outside) == before
    assert len(Path("scores.jsonl").read_text().splitlines()) == 96


ADDRESS = "http://169.254.0.1/a.jsonl"


@pytest.mark.parametrize(
    ("option", "files"), [("train_files", ADDRESS), ("predict_files", [{"path": ADDRESS.replace("http", "HTTPS")}])]
)
def test_a_config_cannot_name_files_on_a_web_server(
    outside: Path, capsys: pytest.CaptureFixture[str], option: str, files: Any
) -> None:
    write_config({"data": {option: files}}, outside)
    assert main(["predict", "--config=config.yaml", "--model.name_or_path=x"]) == 2
    error = capsys.readouterr().err
    assert (
        f"error: data.{option}: expected files of this machine or of a storage service, found a web address."
        in error.replace("HTTPS", "https")
    )
    assert f"give this one on the command line: --data.{option}=ADDRESS" in error


@pytest.mark.parametrize("value", [ADDRESS, f"[{{path: '{ADDRESS}', weight: 2}}]"])
def test_the_command_line_may_name_files_on_a_web_server(
    outside: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    write_config({"data": {"train_files": "s3://bucket/a.jsonl", "validation_files": "gs://bucket/a.jsonl"}}, outside)
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--config=config.yaml", "--model.name_or_path=x", f"--data.train_files={value}", "--print_config"])
    assert caught.value.code == 0
