"""Checkpoints as folders: what a path means, what is in a manifest, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bco_lightning.checkpointing import (
    VerifiedCheckpointIO,
    newest_verified,
    read_checkpoint,
    resolve_checkpoint,
    saved_steps,
    step_folder,
    verify_checkpoint,
    write_checkpoint,
)
from bco_lightning.errors import CheckpointError


def refuse(error: CheckpointError) -> None:
    raise AssertionError(f"nothing was to be skipped: {error}")


def write(folder: Path, step: int, **more: Any) -> Path:
    target = step_folder(folder, step)
    write_checkpoint({"global_step": step, "weights": torch.arange(3.0), **more}, target)
    return target


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    target = write(tmp_path, 7, fingerprints={"beta": 0.1})
    checkpoint = read_checkpoint(str(target))
    assert checkpoint["global_step"] == 7
    assert torch.equal(checkpoint["weights"], torch.arange(3.0))


def test_the_manifest_tells_the_step_and_what_the_run_is_made_of(tmp_path: Path) -> None:
    target = write(tmp_path, 7, fingerprints={"beta": 0.1}, versions={"torch": "x"}, accepted_changes=["step 3: beta"])
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert manifest["fingerprints"] == {"beta": 0.1}
    assert manifest["versions"] == {"torch": "x"}
    assert manifest["accepted_changes"] == ["step 3: beta"]
    assert manifest["files"]["state.ckpt"]["bytes"] == (target / "state.ckpt").stat().st_size


def test_steps_are_ordered_as_numbers_not_as_names(tmp_path: Path) -> None:
    for step in (9, 100_000_000, 10):
        write(tmp_path, step)
    (tmp_path / "step-x").mkdir()
    assert [int(path.name[5:]) for path in saved_steps(tmp_path)] == [9, 10, 100_000_000]
    newest = newest_verified(tmp_path, refuse)
    assert newest is not None
    assert newest.name == "step-100000000"


def test_a_path_may_name_a_step_a_run_a_folder_of_runs_or_a_file(tmp_path: Path) -> None:
    old, new = (write(tmp_path / "runs" / f"version_{run}" / "checkpoints", step) for run, step in ((0, 9), (1, 3)))
    os.utime(old, ns=(1, 1))
    (tmp_path / "runs" / "version_2").mkdir()  # a run that has saved nothing yet
    torch.save({}, tmp_path / "other.ckpt")
    assert resolve_checkpoint(old, refuse) == old
    assert resolve_checkpoint(old.parent, refuse) == old
    assert resolve_checkpoint(tmp_path / "runs" / "version_0", refuse) == old
    assert resolve_checkpoint(tmp_path / "runs", refuse) == new
    assert resolve_checkpoint(tmp_path / "other.ckpt", refuse) == tmp_path / "other.ckpt"
    with pytest.raises(CheckpointError, match="expected a whole checkpoint to go on with, found none"):
        resolve_checkpoint(tmp_path / "runs" / "version_2", refuse)


def test_a_damaged_step_is_passed_over_and_said_so(tmp_path: Path) -> None:
    whole, damaged = write(tmp_path, 1), write(tmp_path, 2)
    (damaged / "state.ckpt").write_bytes(b"")
    told: list[CheckpointError] = []
    assert resolve_checkpoint(tmp_path, told.append) == whole
    (error,) = told
    assert "step-00000002/state.ckpt: expected" in str(error)
    assert "found 0" in str(error)


def test_a_step_written_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    write(tmp_path, 1, note="first")
    target = write(tmp_path, 1, note="second")
    assert read_checkpoint(str(target))["note"] == "second"
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_format_of_another_version_is_refused(tmp_path: Path) -> None:
    from bco_lightning.checkpointing import _sealed

    target = write(tmp_path, 1)
    manifest = json.loads((target / "manifest.json").read_text())
    del manifest["checksum"]
    (target / "manifest.json").write_bytes(_sealed({**manifest, "format": 2}))
    with pytest.raises(CheckpointError, match="expected the manifest as it was written"):
        verify_checkpoint(target)


def test_lightning_saves_loads_and_removes_through_it(tmp_path: Path) -> None:
    io, target = VerifiedCheckpointIO(), step_folder(tmp_path, 4)
    io.save_checkpoint({"global_step": 4}, target)
    assert io.load_checkpoint(target, weights_only=False) == {"global_step": 4}
    io.remove_checkpoint(target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["http://example.org/x.ckpt", "s3://bucket/x.ckpt"])
def test_a_url_is_not_read(path: str) -> None:
    with pytest.raises(CheckpointError, match="expected a local checkpoint, found a URL"):
        read_checkpoint(path)
