"""Reference log-probs on disk: whole files only, many writers, no number that is none."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from bco_lightning.places import cache_root
from bco_lightning.reference import column as on_disk
from bco_lightning.reference.column import RECORD, keys_and_lengths, read_records, write_records


def records(*pairs: tuple[int, float]) -> np.ndarray:
    return np.array([(number.to_bytes(16, "big"), value) for number, value in pairs], RECORD)


def content(folder: Path) -> dict[int, float]:
    return {int.from_bytes(key.ljust(16, b"\0"), "big"): float(value) for key, value in read_records(folder)}


def test_what_one_writes_another_reads(tmp_path: Path) -> None:
    write_records(tmp_path / "a", records((1, -1.5), (256, -2.5)))
    assert content(tmp_path / "a") == {1: -1.5, 256: -2.5}
    assert content(tmp_path / "b") == {}


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
def test_a_damaged_file_is_passed_over_with_its_name(damage: str, tmp_path: Path) -> None:
    write_records(tmp_path, records((1, -1.0)))
    write_records(tmp_path, records((2, -2.0)))
    (file,) = [file for file in tmp_path.glob("*.npy") if records((1, -1.0)).tobytes() in file.read_bytes()]
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-3], "changed": whole[:-1] + bytes([whole[-1] ^ 1]), "emptied": b""}[damage])
    with pytest.warns(UserWarning, match=f"{file.name}.*damaged"):
        assert content(tmp_path) == {2: -2.0}
    write_records(tmp_path, records((1, -1.0)))  # computed again: the file is whole again
    assert content(tmp_path) == {1: -1.0, 2: -2.0}


def write_many(folder: str, first: int) -> None:
    for number in range(first, first + 60, 2):
        write_records(Path(folder), records((number, -number), (1000, -1000)))


@pytest.mark.slow
def test_two_writers_at_once_lose_nothing_and_leave_few_files(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_many, args=(str(tmp_path), first)) for first in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert content(tmp_path) == {number: float(-number) for number in [*range(60), 1000]}
    assert len(list(tmp_path.iterdir())) <= on_disk._MOST_FILES + 2
    assert not list(tmp_path.rglob("*.partial*"))


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"could not be written.*model\.cache_folder"):
        write_records(tmp_path / "file" / "folder", records((1, -1.0)))


def test_the_folder_is_the_given_one_or_that_of_the_environment_or_the_users_own(monkeypatch) -> None:
    monkeypatch.setenv("BCO_CACHE", "/there")
    assert cache_root("here") == Path("here")
    assert cache_root(None) == Path("/there")
    monkeypatch.delenv("BCO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root(None) == Path("/xdg/bco_lightning")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_root(None) == Path("/home/someone/.cache/bco_lightning")


def test_keys_depend_on_tokens_and_mask_alone() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "completion_mask": [False, False, True], "thumbs_up": True},
        {"input_ids": [1, 2, 3], "completion_mask": [False, False, True], "thumbs_up": False},
        {"input_ids": [1, 2, 3], "completion_mask": [False, True, True], "thumbs_up": True},
        {"input_ids": [1, 2, 3, 4], "completion_mask": [False, False, True, True], "thumbs_up": True},
        {"input_ids": [1, 2, 259], "completion_mask": [False, False, True], "thumbs_up": True},
    ]
    dataset = Dataset.from_list(rows * 300)
    keys, lengths = keys_and_lengths(dataset)
    assert len(keys) == len(lengths) == 1500
    assert (keys[:5] == keys[-5:]).all()
    assert [list(keys[:5]).index(key) for key in keys[:5]] == [0, 0, 2, 3, 4]
    assert lengths[:5].tolist() == [3, 3, 3, 4, 3]
    shuffled, _ = keys_and_lengths(dataset.select(range(1499, -1, -1)))
    assert (shuffled == keys[::-1]).all()
