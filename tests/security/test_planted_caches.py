"""What lies in a cache is believed only where nobody else can have put it there; nothing there makes a start wait."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from bco_lightning.cli.app import main
from bco_lightning.models.gguf import FOLDER
from bco_lightning.models.load import load_language_model
from bco_lightning.reference.column import RECORD, read_records, write_records
from tests.trials import Trials
from tests.unit.test_gguf import write_gguf

PLANTED = np.array([(b"k" * 16, -1.0)], RECORD)


def of_another_user(folder: Path) -> None:
    if os.getuid() == 0:
        os.chown(folder, 12345, 12345)
    else:  # who is not root cannot give a folder away
        folder.chmod(0o777)


def linked(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def linked_file(folder: Path) -> None:
    (file,) = folder.glob("*.npy")
    file.rename(folder.parent / file.name)
    file.symlink_to(folder.parent / file.name)


def pipe(folder: Path) -> None:
    (file,) = folder.glob("*.npy")
    file.unlink()
    os.mkfifo(file)


PLANTS: dict[str, Callable[[Path], None]] = {
    "writable by the group": lambda folder: folder.chmod(0o770),
    "writable by all": lambda folder: folder.chmod(0o777),
    "readable by all": lambda folder: folder.chmod(0o755),
    "of another user": of_another_user,
    "a link": linked,
    "a link in it": linked_file,
    "a pipe in it": pipe,
    "a folder in it": lambda folder: (folder / f"{'0' * 32}.npy").mkdir(),
}


@pytest.mark.promise("S16", "a planted cache is passed over: another's, open to others, a link, a pipe")
@pytest.mark.filterwarnings("ignore:.*it is passed over")
@pytest.mark.filterwarnings("ignore:.*could not be written")
def test_planted_log_probs_are_passed_over(trials: Trials, tmp_path: Path) -> None:
    for trial in trials(list(PLANTS), quick=8):
        with trial as name:
            folder = tmp_path / name / "cache"
            write_records(folder, PLANTED)
            assert len(read_records(folder)) == 1
            PLANTS[name](folder)
            if name == "a folder in it":
                assert len(read_records(folder)) == 1
                continue
            assert len(read_records(folder)) == 0
            if not name.endswith("in it"):  # nor are values put where others could change them
                before = sorted(folder.iterdir())
                write_records(folder, np.array([(b"l" * 16, -2.0)], RECORD))
                assert sorted(folder.iterdir()) == before


@pytest.mark.promise("S16", "a converted model is mapped only from a folder that nobody else can write to")
def test_a_planted_model_is_converted_again(trials: Trials, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, seed=0)
    honest = load_language_model(str(file), torch.float32, cache_folder=str(tmp_path / "honest")).state_dict()
    for trial in trials(["writable by all", "of another user", "a link"], quick=1):
        with trial as name:
            cache = tmp_path / name
            shutil.copytree(tmp_path / "honest", cache)
            (folder,) = (path for path in (cache / FOLDER).iterdir() if path.is_dir())
            planted = load_language_model(str(folder), torch.float32)
            for parameter in planted.parameters():
                parameter.data.zero_()
            planted.save_pretrained(folder)
            folder.chmod(0o700)
            PLANTS[name](folder)
            found = load_language_model(str(file), torch.float32, cache_folder=str(cache)).state_dict()
            assert all(torch.equal(found[key], value) for key, value in honest.items())


@pytest.mark.parametrize("option", ["data.cache_folder", "model.cache_folder"])
@pytest.mark.parametrize("folder", ["here", "OUTSIDE"])
def test_a_config_cannot_say_where_caches_are(
    option: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group, name = option.split(".")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({group: {name: folder}}))
    assert main(["fit", "--config", str(config), "--model.name_or_path=x", "--data.train_files=log.jsonl"]) == 2
    assert f"error: {option}: expected it on the command line alone" in capsys.readouterr().err
