"""Reference log-probs on disk: whole files only, many writers, no number that is none."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from bco_lightning import reference_store
from bco_lightning.places import cache_root
from bco_lightning.reference_store import RECORD, ReferenceStore


def records(*pairs: tuple[int, float]) -> np.ndarray:
    return np.array([(number.to_bytes(16, "big"), value) for number, value in pairs], RECORD)


def content(store: ReferenceStore) -> dict[int, float]:
    return {int.from_bytes(key.ljust(16, b"\0"), "big"): float(value) for key, value in store.read()}


def test_what_one_appends_another_reads(tmp_path: Path) -> None:
    ReferenceStore(tmp_path, "a" * 64).append(records((1, -1.5), (256, -2.5)))
    assert content(ReferenceStore(tmp_path, "a" * 64)) == {1: -1.5, 256: -2.5}
    assert content(ReferenceStore(tmp_path, "b" * 64)) == {}


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
def test_a_damaged_file_is_passed_over_with_its_name(damage: str, tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, "a" * 64)
    store.append(records((1, -1.0)))
    store.append(records((2, -2.0)))
    (file,) = [file for file in store.folder.glob("*.npy") if records((1, -1.0)).tobytes() in file.read_bytes()]
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-3], "changed": whole[:-1] + bytes([whole[-1] ^ 1]), "emptied": b""}[damage])
    with pytest.warns(UserWarning, match=f"{file.name}.*damaged"):
        assert content(store) == {2: -2.0}
    store.append(records((1, -1.0)))  # computed again: the file is whole again
    assert content(store) == {1: -1.0, 2: -2.0}


def test_values_that_are_not_finite_are_neither_written_nor_read(tmp_path: Path, monkeypatch) -> None:
    store = ReferenceStore(tmp_path, "a" * 64)
    store.append(records((1, np.nan), (2, -2.0), (3, -np.inf)))
    assert content(store) == {2: -2.0}
    store.append(records((4, np.nan)))
    assert len(list(store.folder.iterdir())) == 1
    store._write(records((5, np.inf)))
    assert content(store) == {2: -2.0}


def test_many_files_become_one_without_loss(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, "a" * 64)
    for number in range(40):
        store.append(records((number, -number)))
    assert content(store) == {number: -number for number in range(40)}
    assert len(list(store.folder.iterdir())) <= reference_store._MOST_FILES + 1


def test_a_reader_lists_again_when_files_are_put_together_meanwhile(tmp_path: Path, monkeypatch) -> None:
    store, other = (ReferenceStore(tmp_path, "a" * 64) for _ in range(2))
    for number in range(5):
        store.append(records((number, -number)))
    list_files, calls = store._files, []

    def listed_before_the_others_change() -> list[Path]:
        files = list_files()
        if not calls:
            other._put_together()
        calls.append(files)
        return files

    monkeypatch.setattr(store, "_files", listed_before_the_others_change)
    assert content(store) == {number: -number for number in range(5)}
    assert len(calls) == 2


def write_many(root: str, first: int) -> None:
    store = ReferenceStore(Path(root), "a" * 64)
    for number in range(first, first + 60, 2):
        store.append(records((number, -number), (1000, -1000)))


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_many, args=(str(tmp_path), first)) for first in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    expected = {number: float(-number) for number in [*range(60), 1000]}
    assert content(ReferenceStore(tmp_path, "a" * 64)) == expected
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"could not be written.*model\.cache_folder"):
        ReferenceStore(tmp_path / "file", "a" * 64).append(records((1, -1.0)))


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
