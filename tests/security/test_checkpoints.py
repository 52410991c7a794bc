"""Checkpoints from others: no code out of any of them, no URL without a digest, no path that leads elsewhere."""

from __future__ import annotations

import hashlib
import http.server
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bco_lightning.checkpointing import (
    _sealed,
    newest_verified,
    read_checkpoint,
    saved_steps,
    step_folder,
    verify_checkpoint,
    write_checkpoint,
)
from bco_lightning.cli import main
from bco_lightning.errors import CheckpointError, UnsafeCheckpointError
from bco_lightning.export import export_checkpoint, load_aligned
from tests.reliability.tiny_run import make_log, make_model
from tests.trials import Trials

CARRIERS = (
    "bare pickle", "weights", "hyper_parameters", "callbacks", "optimizer_states", "loops", "verified folder",
    "sharded folder",
)  # fmt: skip
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
def honest(model: str, feedback: str) -> dict[str, Any]:
    """A checkpoint of a real run, after its first step."""
    assert command("fit", model, feedback, "--trainer.max_steps=1") == 0
    return read_checkpoint(str(step_folder(Path("runs/bco/version_0/checkpoints"), 1)))


def command(name: str, model: str, log: str, *more: str) -> int:
    options = {
        "model.name_or_path": model, "model.dtype": "float32", "data.train_files": log, "trainer.accelerator": "cpu",
        "data.max_length": "96", "data.validation_files": log, "trainer.max_epochs": "-1",
    }  # fmt: skip
    return main([name, *(f"--{key}={value}" for key, value in options.items()), "--trainer.max_steps=2", *more])


def plant(carrier: str, honest: dict[str, Any], marker: Path, folder: Path) -> Path:
    """Writes a checkpoint that looks honest and holds the payload."""
    payload, target = Payload(marker), folder / "hostile.ckpt"
    hostile = dict(honest)
    if carrier == "bare pickle":
        target.write_bytes(pickle.dumps({**hostile, "state_dict": payload}))
    elif carrier == "sharded folder":
        target = folder / "hostile"
        target.mkdir()
        (target / ".metadata").write_bytes(pickle.dumps(payload))
        torch.save({"payload": payload}, target / "meta.pt")
    elif carrier == "verified folder":
        target = step_folder(folder, 7)
        write_checkpoint({**hostile, "extra": payload}, target)
        verify_checkpoint(target)
    else:
        hostile = {**hostile, "state_dict" if carrier == "weights" else carrier: {"payload": payload}}
        torch.save(hostile, target)
    return target


def read(reader: str, path: Path, model: str, log: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Reads a checkpoint in one of the ways a user can, and returns the error in words."""
    if reader in ("fit", "validate"):
        capsys.readouterr()
        assert command(reader, model, log, f"--ckpt_path={path}", "--run_folder=other") == 2
        return capsys.readouterr().err
    with pytest.raises(CheckpointError) as raised:
        load_aligned(path) if reader == "load_aligned" else export_checkpoint(path, Path("out"))
    expected = CheckpointError if "sharded" in str(path) or path.name == "hostile" else UnsafeCheckpointError
    assert type(raised.value) is expected
    return str(raised.value)


@pytest.mark.promise("S1", "No reader runs code out of a checkpoint, wherever it is planted")
def test_no_reader_runs_code_out_of_a_checkpoint(
    honest: dict[str, Any],
    model: str,
    feedback: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    trials: Trials,
) -> None:
    marker = tmp_path / "marker"
    for trial in trials([(carrier, reader) for carrier in CARRIERS for reader in READERS], quick=12):
        with trial as (carrier, reader):
            folder = tmp_path / f"{carrier}-{reader}"
            folder.mkdir()
            path = plant(carrier, honest, marker, folder)
            said = read(reader, path, model, feedback, capsys)
            assert not marker.exists()
            words = (
                "expected a whole checkpoint"
                if carrier == "sharded folder"
                else "objects that would run code when read"
            )
            assert words in said
    # The payload works: read the way that is not allowed, it leaves its mark.
    torch.load(plant("weights", honest, marker, tmp_path), weights_only=False)
    assert marker.exists()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Serves files of a folder on the loopback interface."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, directory=str(folder), **options)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def publish(file: Path) -> str:
        (folder / "a.ckpt").write_bytes(file.read_bytes())
        return f"http://127.0.0.1:{server.server_port}/a.ckpt"

    yield publish
    server.shutdown()


@pytest.mark.promise("S2", "A checkpoint by URL needs its digest, and the right one")
def test_a_checkpoint_by_url_needs_its_digest(
    honest: dict[str, Any], model: str, feedback: str, served: Callable[[Path], str],
    capsys: pytest.CaptureFixture[str], trials: Trials,
) -> None:  # fmt: skip
    assert honest["global_step"] == 1
    file = Path("runs/bco/version_0/checkpoints/step-00000001/state.ckpt")
    url, digest = served(file), hashlib.sha256(file.read_bytes()).hexdigest()
    cases = [
        ("", "ends in #sha256="),
        (f"#sha256={'0' * 64}", "expected SHA-256 000000000000"),
        (f"#sha256={digest}", ""),
    ]
    for trial in trials(cases, quick=3):
        with trial as (fragment, message):
            code = command("validate", model, feedback, f"--ckpt_path={url}{fragment}")
            said = capsys.readouterr()
            assert code == (2 if message else 0)
            assert message in said.err
            assert ("val/loss" in said.out) == (not message)


def redirected(kind: str, folder: Path, outside: Path) -> Path:
    """A step whose folder, files or manifest lead out of the run's folder."""
    step = step_folder(folder, 9)
    write_checkpoint({"global_step": 9, "weights": torch.ones(3)}, step)
    if kind == "linked folder":
        step.rename(outside / "elsewhere")
        step.symlink_to(outside / "elsewhere")
        return step
    if kind in ("linked file", "linked manifest"):
        name = "state.ckpt" if kind == "linked file" else "manifest.json"
        (step / name).rename(outside / name)
        (step / name).symlink_to(outside / name)
        return step
    names = {"climbing": "../../outside/secret", "absolute": str(outside / "secret"), "nested": "a/b"}
    manifest = json.loads((step / "manifest.json").read_text())
    del manifest["checksum"]
    facts = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    (step / "manifest.json").write_bytes(_sealed({**manifest, "files": {names[kind]: facts}}))
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
                read_checkpoint(str(step))
            told: list[CheckpointError] = []
            assert newest_verified(folder, told.append) == step_folder(folder, 8)
            assert len(told) == 1
            assert snapshot(outside) == before
    assert saved_steps(tmp_path / "nowhere") == []
