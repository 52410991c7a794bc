"""Checkpoints as folders: what comes back, what a path means, what is in a manifest, what is refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bco_lightning import BCOModule, LoraSettings
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.checkpoints.folders import saved_steps, step_folder
from bco_lightning.checkpoints.format import VerifiedCheckpointIO, read_checkpoint, write_checkpoint
from bco_lightning.checkpoints.manifest import resolve_checkpoint
from bco_lightning.checkpoints.optimizers import restore_states, states_by_name
from bco_lightning.checkpoints.runs import LOCK_FILE, claim_run, hold_run, let_go_of
from bco_lightning.errors import CheckpointError, ConfigError
from tests.conftest import tiny_data, tiny_module, tiny_trainer
from tests.reliability.tiny_run import assert_same


def refuse(error: CheckpointError) -> None:
    raise AssertionError(f"nothing was to be skipped: {error}")


def write(folder: Path, step: int, **more: Any) -> Path:
    target = step_folder(folder, step)
    write_checkpoint({"global_step": step, "weights": torch.arange(3.0), **more}, target)
    return target


def test_tensors_and_plain_values_come_back_as_they_were(tmp_path: Path) -> None:
    memory = torch.arange(12.0)
    values = {
        "numbers": [1, -0.0, float("inf"), float("nan"), 10**30, True, None, 1e-323],
        "texts": {"": "ä👍\n", "a/b": "$tensor"},
        "keys": {1: "one", (2, "x"): [()], None: 0.5, "$dict": 1},
        "tuples": [(1, [2, (3,)])],
        "tensors": {
            "transposed": memory.view(3, 4).t(),
            "overlapping": [memory[:8], memory[4:]],
            "scalar": torch.tensor(7),
            "empty": torch.zeros(0, 2, dtype=torch.bfloat16),
            "bool": torch.tensor([True, False]),
            "double": torch.tensor([1 / 3], dtype=torch.float64),
        },
    }
    target = write(tmp_path, 7, **values)
    found = read_checkpoint(target)
    assert_same({name: found[name] for name in values}, values)
    assert {path.suffix for path in target.iterdir()} == {".json", ".safetensors"}  # nothing that could run code


def test_a_value_that_could_not_be_read_back_is_refused_when_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint, callbacks/0: expected tensors.*, found a PosixPath"):
        write(tmp_path, 7, callbacks=[tmp_path])
    assert not list(tmp_path.iterdir())


def test_the_manifest_tells_the_step_and_what_the_run_is_made_of(tmp_path: Path) -> None:
    target = write(tmp_path, 7, fingerprints={"beta": 0.1}, versions={"torch": "x"}, accepted_changes=["step 3: beta"])
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert manifest["fingerprints"] == {"beta": 0.1}
    assert manifest["versions"] == {"torch": "x"}
    assert manifest["accepted_changes"] == ["step 3: beta"]
    assert manifest["files"].keys() == {path.name for path in target.iterdir()} - {"manifest.json"}


def test_steps_are_ordered_as_numbers_not_as_names(tmp_path: Path) -> None:
    for step in (9, 100_000_000, 10):
        write(tmp_path, step)
    (tmp_path / "step-x").mkdir()
    assert [int(path.name[5:]) for path in saved_steps(tmp_path)] == [9, 10, 100_000_000]
    assert resolve_checkpoint(tmp_path, refuse).name == "step-100000000"


def test_a_path_may_name_a_step_a_run_or_a_folder_of_runs(tmp_path: Path) -> None:
    old, new = (write(tmp_path / "runs" / f"version_{run}" / "checkpoints", step) for run, step in ((0, 9), (1, 3)))
    os.utime(old, ns=(1, 1))
    (tmp_path / "runs" / "version_2").mkdir()  # a run that has saved nothing yet
    assert resolve_checkpoint(old, refuse) == old
    assert resolve_checkpoint(old.parent, refuse) == old
    assert resolve_checkpoint(tmp_path / "runs" / "version_0", refuse) == old
    assert resolve_checkpoint(tmp_path / "runs", refuse) == new
    with pytest.raises(CheckpointError, match="expected a whole checkpoint to go on with, found none"):
        resolve_checkpoint(tmp_path / "runs" / "version_2", refuse)


@pytest.mark.parametrize(
    ("what", "newest"),
    [
        ("the clock went back", "version_10"),
        ("the first run went on last", "version_2"),
        ("the newest run has another name now", "the good one"),
        ("runs of before starts were numbered", "version_10"),
        ("what tells the start is no number", "version_2"),
        ("a backup beside it", "version_10"),
    ],
)
def test_the_newest_run_is_the_one_that_was_started_last_whatever_clocks_and_names_say(
    what: str, newest: str, tmp_path: Path
) -> None:
    runs = [tmp_path / "version_2", tmp_path / "version_10"]
    for age, run in enumerate(runs):
        os.utime(write(run / "checkpoints", 5), ns=(10**18 - age, 10**18 - age))
        hold_run(run)
        let_go_of(run)
    if what == "the first run went on last":
        hold_run(runs[0])
        let_go_of(runs[0])
    elif what == "the newest run has another name now":
        runs[1].rename(tmp_path / newest)
    elif what == "runs of before starts were numbered":
        for run in runs:
            (run / LOCK_FILE).unlink()
    elif what == "what tells the start is no number":
        (runs[1] / LOCK_FILE).write_text("many")
    elif what == "a backup beside it":
        shutil.copytree(runs[1], tmp_path / "version_10.backup")
    assert resolve_checkpoint(tmp_path, refuse) == tmp_path / newest / "checkpoints" / "step-00000005"


def test_a_step_under_the_name_of_another_is_refused_and_passed_over(tmp_path: Path) -> None:
    told: list[CheckpointError] = []
    renamed = write(tmp_path, 3).rename(step_folder(tmp_path, 9))
    with pytest.raises(
        CheckpointError, match=r"expected the checkpoint of the step that its folder is named after, .* step 3"
    ):
        read_checkpoint(renamed)
    step = write(tmp_path, 5)
    assert resolve_checkpoint(tmp_path, told.append) == step
    assert [error.where for error in told] == [str(renamed / "manifest.json")]
    assert read_checkpoint(renamed.rename(tmp_path / "the best"))["global_step"] == 3


def test_a_name_that_is_taken_is_no_new_run(tmp_path: Path) -> None:
    for name in ("version_3", "version_x", "version_"):
        (tmp_path / name).mkdir()
    (tmp_path / "version_4").touch()
    (tmp_path / "version_6").symlink_to("gone")
    assert [claim_run(tmp_path).name for _ in range(2)] == ["version_7", "version_8"]
    with pytest.raises(ConfigError, match="run_folder: expected a folder to make runs in, found that it cannot be"):
        claim_run(tmp_path / "version_4" / "runs")


def test_where_a_file_system_has_no_locks_a_run_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="its file system has no locks"):
        hold_run(tmp_path)
    let_go_of(tmp_path)


def test_a_folder_that_is_no_checkpoint_is_not_replaced_by_one(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "log.jsonl").write_text("rows")
    for taken in (tmp_path / "data", tmp_path / "data" / "log.jsonl"):
        with pytest.raises(CheckpointError, match="expected a name that is free, or a checkpoint of before, found"):
            write_checkpoint({"global_step": 1}, taken)
    assert (tmp_path / "data" / "log.jsonl").read_text() == "rows"


def test_a_step_written_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    write(tmp_path, 1, note="first")
    target = write(tmp_path, 1, note="second")
    assert read_checkpoint(target)["note"] == "second"
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_format_of_another_version_is_refused(tmp_path: Path) -> None:
    from bco_lightning.checkpoints.manifest import _sealed

    target = write(tmp_path, 1)
    manifest = json.loads((target / "manifest.json").read_text())
    del manifest["checksum"]
    (target / "manifest.json").write_bytes(_sealed({**manifest, "format": 1}))
    with pytest.raises(CheckpointError, match="expected format 2, found 1"):
        read_checkpoint(target)


def test_a_url_is_not_read() -> None:
    with pytest.raises(CheckpointError, match="expected a local checkpoint, found a URL"):
        read_checkpoint("https://example.org/x.ckpt")


def test_a_chosen_step_that_is_damaged_falls_back_if_it_was_not_named(tmp_path: Path) -> None:
    whole, damaged = write(tmp_path, 1), write(tmp_path, 2)
    (damaged / "values.json").write_bytes((damaged / "values.json").read_bytes().replace(b"2", b"3"))
    assert VerifiedCheckpointIO(may_fall_back=True).load_checkpoint(damaged)["global_step"] == 1
    with pytest.raises(CheckpointError, match=r"step-00000002/values.json: expected the bytes that were written"):
        VerifiedCheckpointIO().load_checkpoint(damaged)
    VerifiedCheckpointIO().remove_checkpoint(whole)
    assert [path.name for path in tmp_path.iterdir()] == [damaged.name]


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)


def _trained(module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, **options)
    sum((parameter**3).sum() for parameter in module.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return optimizer


def test_an_optimizers_state_goes_by_names_whatever_the_order_of_parameters() -> None:
    module = _Two()
    (saved,) = states_by_name(module, [_trained(module)])
    other = _Two()
    optimizer = torch.optim.AdamW(reversed(list(other.parameters())), lr=0.5)
    restore_states(other, [optimizer], [saved])
    assert optimizer.param_groups[0]["lr"] == 0.1
    for name, parameter in other.named_parameters():
        assert_same(optimizer.state[parameter], saved["state"][name], name)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("shape", r"expected exp_avg of first.weight of shape \(2, 3\), torch.float32, found \(3, 2\)"),
        ("dtype", r"found \(2, 3\), torch.int32"),
        ("kind", "found float"),
        ("keys", "of first.weight, found others"),
        ("names", "expected the state of 4 parameters, found that of others"),
    ],
)
def test_a_state_that_an_optimizer_has_not_made_does_not_reach_it(damage: str, words: str) -> None:
    module = _Two()
    (saved,) = states_by_name(module, [_trained(module)])
    weight = dict(saved["state"]["first.weight"])
    weight |= {
        "shape": {"exp_avg": weight["exp_avg"].t()},
        "dtype": {"exp_avg": weight["exp_avg"].int()},
        "kind": {"exp_avg": 1.0},
        "keys": {"else": 1.0},
        "names": {},
    }[damage]
    hostile = {**saved, "state": {**saved["state"], "first.weight" if damage != "names" else "third": weight}}
    with pytest.raises(CheckpointError, match=words):
        restore_states(module, [torch.optim.AdamW(module.parameters())], [hostile])


def test_moments_take_the_strides_of_their_parameter() -> None:
    module = _Two()
    (saved,) = states_by_name(module, [_trained(module)])
    other = _Two()
    other.first.weight = nn.Parameter(torch.ones(3, 2).t())
    optimizer = torch.optim.AdamW(other.parameters(), fused=True)
    restore_states(other, [optimizer], [saved])
    assert optimizer.state[other.first.weight]["exp_avg"].stride() == other.first.weight.stride() == (1, 2)
    assert torch.equal(optimizer.state[other.first.weight]["exp_avg"], saved["state"]["first.weight"]["exp_avg"])


@pytest.mark.parametrize("lora", [LoraSettings(r=2, top_layers=1), None], ids=["lora", "full"])
def test_a_module_is_made_again_from_a_checkpoint_alone(
    lora: LoraSettings | None, tiny_model: str, log: str, tmp_path: Path
) -> None:
    module = tiny_module(tiny_model, beta=0.3, lora=lora, class_weights=(1.0, 2.0))
    saving = RunCheckpoint(every_n_steps=2)
    options: dict[str, Any] = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    tiny_trainer(max_steps=2, callbacks=[saving], **options).fit(module, tiny_data(log))
    again = BCOModule.load_from_checkpoint(saving.saved)
    assert again.options == module.options
    assert again.reward_shift.state_dict() == module.reward_shift.state_dict()
    assert_same(dict(again.state_dict()), dict(module.state_dict()))
    assert "optimizer_states" not in read_checkpoint(str(saving.saved), moments=False)
