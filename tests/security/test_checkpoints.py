"""Checkpoints from others: no code out of any of them, no path that leads elsewhere."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim import AdamW

from bco_lightning.checkpoints.folders import saved_steps, step_folder
from bco_lightning.checkpoints.format import read_checkpoint, write_checkpoint
from bco_lightning.checkpoints.manifest import _sealed, newest_verified
from bco_lightning.checkpoints.optimizers import restore_states, states_by_name
from bco_lightning.cli.app import main
from bco_lightning.errors import CheckpointError
from bco_lightning.identity import random_state, set_random_state
from bco_lightning.serving.export import export_checkpoint, load_aligned
from tests.reliability.tiny_run import make_log, make_model
from tests.trials import Trials

CARRIERS = ("bare pickle", "torch file", "DCP folder", "values", "tensors")
READERS = ("fit", "validate", "load_aligned", "export")


class Payload:
    """Writes a marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def feedback(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_log(tmp_path_factory.mktemp("log") / "log.jsonl", num_rows=24)


@pytest.fixture
def honest(model: str, feedback: str) -> Path:
    """The checkpoint of a real run, after its first step."""
    assert command("fit", model, feedback, "--trainer.max_steps=1") == 0
    return step_folder(Path("runs/bco/version_0/checkpoints"), 1)


def command(name: str, model: str, log: str, *more: str) -> int:
    options = {
        "model.name_or_path": model, "model.dtype": "float32", "data.train_files": log, "trainer.accelerator": "cpu",
        "data.max_length": "96", "data.validation_files": log, "trainer.max_epochs": "-1",
    }  # fmt: skip
    return main([name, *(f"--{key}={value}" for key, value in options.items()), "--trainer.max_steps=2", *more])


def plant(carrier: str, honest: Path, marker: Path, folder: Path) -> Path:
    """Writes a checkpoint that looks honest and holds the payload."""
    payload, target = Payload(marker), folder / "hostile.ckpt"
    if carrier == "bare pickle":
        target.write_bytes(pickle.dumps(payload))
    elif carrier == "torch file":
        torch.save({**read_checkpoint(honest), "state_dict": {"payload": payload}}, target)
    elif carrier == "DCP folder":
        target.mkdir()
        (target / ".metadata").write_bytes(pickle.dumps(payload))
        torch.save({"payload": payload}, target / "meta.pt")
    else:
        target = step_folder(folder, 1)
        shutil.copytree(honest, target)
        (target / ".metadata").write_bytes(pickle.dumps(payload))
        file = target / "values.json" if carrier == "values" else next(target.glob("*.safetensors"))
        file.write_bytes(pickle.dumps(payload))
        reseal(target)
    return target


def reseal(step: Path, **files: dict[str, Any]) -> None:
    """Makes a manifest true again, as whoever writes a hostile checkpoint can; or one that names other files."""
    manifest = json.loads((step / "manifest.json").read_text())
    del manifest["checksum"]
    for name in manifest["files"]:
        content = (step / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (step / "manifest.json").write_bytes(_sealed({**manifest, "files": files or manifest["files"]}))


WORDS = {
    "bare pickle": "objects that would run code when read",
    "torch file": "objects that would run code when read",
    "DCP folder": "expected a whole checkpoint",
    "values": "expected plain values",
    "tensors": "expected the tensors of this model, found others",
}


def read(reader: str, path: Path, model: str, log: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Reads a checkpoint in one of the ways a user can, and returns the error in words."""
    if reader in ("fit", "validate"):
        capsys.readouterr()
        assert command(reader, model, log, f"--ckpt_path={path}", "--run_folder=other") == 2
        return capsys.readouterr().err
    with pytest.raises(CheckpointError) as raised:
        load_aligned(path) if reader == "load_aligned" else export_checkpoint(path, Path("out"))
    return str(raised.value)


@pytest.mark.promise("S1", "No reader runs code out of a checkpoint, wherever it is planted")
def test_no_reader_runs_code_out_of_a_checkpoint(
    honest: Path, model: str, feedback: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], trials: Trials
) -> None:
    marker = tmp_path / "marker"
    for trial in trials([(carrier, reader) for carrier in CARRIERS for reader in READERS], quick=10):
        with trial as (carrier, reader):
            folder = tmp_path / f"{carrier}-{reader}"
            folder.mkdir()
            path = plant(carrier, honest, marker, folder)
            said = read(reader, path, model, feedback, capsys)
            assert not marker.exists()
            assert WORDS[carrier] in said
    # The payload works: read the way that is not allowed, it leaves its mark.
    torch.load(plant("torch file", honest, marker, tmp_path), weights_only=False)
    assert marker.exists()


def redirected(kind: str, folder: Path, outside: Path) -> Path:
    """A step whose folder, files or manifest lead out of the run's folder."""
    step = step_folder(folder, 9)
    write_checkpoint({"global_step": 9, "weights": torch.ones(3)}, step)
    if kind == "linked folder":
        step.rename(outside / "elsewhere")
        step.symlink_to(outside / "elsewhere")
        return step
    if kind in ("linked file", "linked manifest"):
        name = "values.json" if kind == "linked file" else "manifest.json"
        (step / name).rename(outside / name)
        (step / name).symlink_to(outside / name)
        return step
    names = {"climbing": "../../outside/secret", "absolute": str(outside / "secret"), "nested": "a/b"}
    reseal(step, **{names[kind]: {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}})
    return step


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.promise("S10", "A checkpoint that leads out of its folder by a link or a name is refused and not followed")
def test_a_checkpoint_that_leads_elsewhere_is_refused(tmp_path: Path, trials: Trials) -> None:
    kinds = ["linked folder", "linked file", "linked manifest", "climbing", "absolute", "nested"]
    for trial in trials(kinds, quick=6):
        with trial as kind:
            folder, outside = tmp_path / kind / "checkpoints", tmp_path / kind / "outside"
            outside.mkdir(parents=True)
            (outside / "secret").write_bytes(b"secret")
            write_checkpoint({"global_step": 8, "weights": torch.ones(3)}, step_folder(folder, 8))
            step = redirected(kind, folder, outside)
            before = snapshot(outside)
            with pytest.raises(CheckpointError):
                read_checkpoint(step)
            told: list[CheckpointError] = []
            assert newest_verified(folder, told.append) == step_folder(folder, 8)
            assert len(told) == 1
            assert snapshot(outside) == before
    assert saved_steps(tmp_path / "nowhere") == []


def other_moments(change: Callable[[dict[str, Any], dict[str, Any]], Any], model: nn.Module) -> None:
    """A step of the optimizer after it was given a state that ``change`` has been at."""
    states = copy.deepcopy(states_by_name(model, [stepped(model)]))
    change(states[0]["state"]["0.weight"], states[0]["param_groups"][0])
    optimizer = AdamW(model.parameters(), fused=True)
    restore_states(model, [optimizer], states)
    take_step(model, optimizer)


def stepped(model: nn.Module) -> AdamW:
    optimizer = AdamW(model.parameters(), fused=True)
    take_step(model, optimizer)
    return optimizer


def take_step(model: nn.Module, optimizer: AdamW) -> None:
    model(torch.ones(4, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


MOMENTS: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "one number for all": lambda state, group: state.update(exp_avg=torch.zeros(1)),
    "none at all": lambda state, group: state.update(exp_avg_sq=torch.empty(0)),
    "of other dimensions": lambda state, group: state.update(exp_avg=torch.zeros(64 * 64)),
    "of twice the width": lambda state, group: state.update(exp_avg=state["exp_avg"].double()),
    "of a quarter of it": lambda state, group: state.update(exp_avg_sq=torch.zeros(64, 64, dtype=torch.int8)),
    "one number, shown at every place": lambda state, group: state.update(exp_avg=torch.zeros(1).expand(64, 64)),
    "transposed": lambda state, group: state.update(exp_avg=state["exp_avg"].t()),
    "backwards in memory": lambda state, group: state.update(exp_avg=torch.zeros(64, 128)[:, ::2]),
    "a text": lambda state, group: state.update(exp_avg="0" * 4096),
    "missing": lambda state, group: state.__delitem__("exp_avg_sq"),
    "one more": lambda state, group: state.update(max_exp_avg_sq=torch.zeros(64, 64)),
    "a step of two numbers": lambda state, group: state.update(step=torch.ones(2)),
    "a step that is no tensor": lambda state, group: state.update(step=1),
    "another kind of optimizer": lambda state, group: group.update(amsgrad=True, capturable=True, differentiable=True),
    "rates of other kinds": lambda state, group: group.update(betas=("x", None), eps="y"),
    "a learning rate of ten numbers": lambda state, group: group.update(lr=torch.zeros(10)),
    "a learning rate that is not a number": lambda state, group: group.update(lr=float("nan")),
    "no settings": lambda state, group: [group.pop(name) for name in [*group] if name != "params"],
}
TAKEN = {"one number, shown at every place", "transposed", "backwards in memory", "another kind of optimizer"}
TAKEN |= {"rates of other kinds", "no settings"}


@pytest.mark.promise("S17", "Hostile moments are refused, or copied into tensors of the optimizer's own making")
def test_hostile_moments_do_not_reach_the_optimizers_kernels(trials: Trials) -> None:
    for trial in trials(list(MOMENTS), quick=len(MOMENTS)):
        with trial as name:
            model = nn.Sequential(nn.Linear(64, 64))
            # A crash would end the process: only a process of its own can tell of it.
            child = os.fork()
            if not child:
                signal.alarm(20)
                torch.set_num_threads(1)  # those of the parent are not here
                try:
                    other_moments(MOMENTS[name], model)
                    status = 1
                except CheckpointError:
                    status = 2
                except BaseException:
                    status = 3
                os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (1 if name in TAKEN else 2)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("numpy", lambda state: state["numpy"].__setitem__(2, 10**7)),
        ("numpy", lambda state: state["numpy"].__setitem__(2, -1)),
        ("numpy", lambda state: state.update(numpy=[])),
        ("torch", lambda state: state["torch"].__setitem__(17, 255)),
        ("torch", lambda state: state.update(torch=state["torch"][:16])),
        ("torch", lambda state: state.update(torch=[1000] * 5056)),
        ("python", lambda state: state["python"][1].__setitem__(-1, 10**6)),
        ("python", lambda state: state.pop("python")),
    ],
)
def test_random_numbers_are_not_taken_from_beside_a_generator(kind: str, change: Callable[[Any], None]) -> None:
    state = random_state()
    change(state)
    with pytest.raises(CheckpointError, match="expected random numbers as they were saved"):
        set_random_state(state)


def test_parts_that_lie_far_apart_make_no_large_tensor(tmp_path: Path) -> None:
    step = step_folder(tmp_path, 1)
    write_checkpoint({"global_step": 1, "weights": torch.ones(3)}, step)
    (file,) = step.glob("*.safetensors")
    where = json.dumps({"weights": {"saved_offsets": [10**12]}})
    save_file({"weights": torch.ones(3)}, file, metadata={"DCP_SHARDING_INFO": where})
    reseal(step)
    with pytest.raises(CheckpointError, match="larger than the files"):
        read_checkpoint(step)
