"""What is in the folder of a checkpoint: tensors in safetensors files, plain values in JSON, a manifest of both."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from bco_lightning.checkpoints.folders import discard, saved_steps, written_whole
from bco_lightning.checkpoints.manifest import MANIFEST_FILE, verify_checkpoint, write_manifest
from bco_lightning.checkpoints.tensors import read_tensors, shapes_of, write_tensors
from bco_lightning.errors import CheckpointError, ConfigError
from bco_lightning.parallel.collectives import Processes, by_all
from bco_lightning.parallel.sharding import is_cut

VALUES_FILE = "values.json"
_TOLD = ("fingerprints", "config_digest", "versions", "accepted_changes")
_MOMENTS = "optimizer_states"
_TENSOR, _TUPLE, _DICT = "$tensor", "$tuple", "$dict"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class VerifiedCheckpointIO(CheckpointIO):
    """Saves a checkpoint as a verified folder, and loads such folders, which cannot run code.

    :class:`~bco_lightning.BCOModule` brings it along for every trainer. Where weights are cut up it is asked in all
    processes, and each writes and reads its parts.

    Args:
        may_fall_back: To an earlier step, where the one to load is damaged and was not asked for by its name.
    """

    def __init__(self, may_fall_back: bool = False) -> None:
        self.may_fall_back = may_fall_back

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """As :func:`write_checkpoint`."""
        write_checkpoint(checkpoint, Path(path))

    @override
    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = None,
        weights_only: bool | None = None,
        *,
        weights: Mapping[str, Tensor] | None = None,
        moments: bool = True,
    ) -> dict[str, Any]:
        """As :func:`read_checkpoint`, in every process; ``weights`` are those that are cut up."""
        folder, everyone = Path(path), Processes.all()
        share = (everyone.global_rank, everyone.world_size) if weights is not None else (0, 1)
        while True:
            try:
                by_all(partial(verify_checkpoint, folder, share), everyone)
            except CheckpointError as error:
                earlier = [step for step in saved_steps(folder.parent) if step.name < folder.name]
                if not (self.may_fall_back and earlier):
                    raise
                rank_zero_info(f"checkpoint: skipped {error}")
                folder = earlier[-1]
            else:
                return _read(folder, weights, moments)

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint; a half-removed one has no checkpoint's name any more."""
        discard(Path(path))


def use_verified_io(strategy: Any, may_fall_back: bool = False) -> None:
    """Has a strategy write and read checkpoints so; refuses another way that the trainer was given."""
    found = strategy.checkpoint_io
    if type(found) not in (TorchCheckpointIO, VerifiedCheckpointIO):
        problem = f"expected no other way to write checkpoints, found {type(found).__name__}."
        remedy = "Leave it out: checkpoints are folders that are verified when they are read."
        raise ConfigError("trainer.plugins", problem, remedy)
    if may_fall_back or not isinstance(found, VerifiedCheckpointIO):
        strategy.checkpoint_io = VerifiedCheckpointIO(may_fall_back)


def write_checkpoint(checkpoint: Mapping[str, Any], target: Path) -> None:
    """Writes tensors and plain values into the folder ``target``, whole or not at all.

    Where tensors are cut up, all processes call this, and each writes its parts; else one of them. The step, and what
    the run is made of, are copied into the manifest, where they can be read without loading anything else.

    Raises:
        CheckpointError: If the disk is full or cannot be written, or a value is none that can be read back; ``target``
            is then as it was before. Where several processes write, in all of them.
    """
    tensors: dict[str, Tensor] = {}
    values = json.dumps(_taken_apart(checkpoint, "", tensors)).encode()
    writers = Processes.all() if any(map(is_cut, tensors.values())) else Processes()
    first = writers.global_rank == 0
    own = tensors if first else {name: value for name, value in tensors.items() if is_cut(value)}
    try:
        with ExitStack() as writing:
            folder = by_all(
                lambda: writing.enter_context(written_whole(_replaceable(target))) if first else None, writers
            )[0]
            parts = by_all(lambda: write_tensors(own, folder), writers)  # which makes the folder, too
            by_all(lambda: _finish(folder, checkpoint, values, parts) if first else None, writers)
            by_all(writing.close, writers)
    except OSError as error:
        remedy = "Give a run_folder that can be written."
        if error.errno in _NO_SPACE:
            remedy = "Free some space, or lower checkpoint.keep; the checkpoints written before are whole."
        problem = f"expected to write a checkpoint, found that {error.strerror or error}."
        raise CheckpointError(str(target), problem, remedy) from error


def _replaceable(target: Path) -> Path:
    if os.path.lexists(target) and not (target / MANIFEST_FILE).is_file():
        problem = "expected a name that is free, or a checkpoint of before, found something else."
        raise CheckpointError(str(target), problem, "Choose another name.")
    return target


def _finish(folder: Path, checkpoint: Mapping[str, Any], values: bytes, parts: list[dict[str, Any]]) -> None:
    (folder / VALUES_FILE).write_bytes(values)
    files = {VALUES_FILE: {"bytes": len(values), "sha256": hashlib.sha256(values).hexdigest()}}
    for part in parts:
        files |= part
    told = {key: checkpoint[key] for key in _TOLD if key in checkpoint}
    write_manifest(folder, {"step": checkpoint.get("global_step"), **told}, files)


def read_checkpoint(path: Path | str, *, moments: bool = True) -> dict[str, Any]:
    """Verifies and reads a step's folder, whole, onto the CPU; no other process is asked.

    Raises:
        CheckpointError: If it is missing, incomplete, changed or unreadable, or a file, which could run code when read.
    """
    if "://" in str(path):
        raise CheckpointError(str(path), "expected a local checkpoint, found a URL.", "Fetch it first.")
    verify_checkpoint(Path(path))
    return _read(Path(path), None, moments)


def _read(folder: Path, weights: Mapping[str, Tensor] | None, moments: bool) -> dict[str, Any]:
    """A tensor under the name of a weight, and of its shape, is cut up like it."""
    shapes, tensors = shapes_of(folder), dict[str, Tensor]()

    def whole(value: dict[str, Any]) -> Any:
        """The inverse of :func:`_taken_apart`, from the inside out, with room for tensors."""
        if _TUPLE in value:
            return tuple(value[_TUPLE])
        if _TENSOR not in value:
            return dict(value[_DICT]) if _DICT in value else value
        key = value[_TENSOR]
        if not moments and key.startswith(_MOMENTS):
            return None
        shape, dtype = shapes[key]
        weight = next((weights[part] for part in key.split("/") if part in weights), None) if weights else None
        if weight is not None and weight.shape == shape:
            tensors[key] = torch.empty_like(weight, dtype=dtype)
        else:
            tensors[key] = torch.zeros(shape, dtype=dtype)
        return tensors[key]

    try:
        checkpoint = dict(json.loads((folder / VALUES_FILE).read_bytes(), object_hook=whole))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = "expected plain values and names of tensors, found something else."
        raise CheckpointError(str(folder / VALUES_FILE), problem) from error
    if not moments:
        checkpoint.pop(_MOMENTS, None)
    read_tensors(folder, tensors)
    return checkpoint


def _taken_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Plain values as JSON has them; tensors go into ``tensors``, under the path that led to them."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        items = [(key, _taken_apart(each, f"{path}/{key}".removeprefix("/"), tensors)) for key, each in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {_DICT: [[_taken_apart(key, path, tensors), each] for key, each in items]}
    if isinstance(value, (list, tuple)):
        items = [_taken_apart(each, f"{path}/{number}", tensors) for number, each in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    problem = f"expected tensors, numbers, texts, lists and dictionaries, found a {type(value).__name__}."
    raise CheckpointError(f"checkpoint, {path}", problem, "A callback may have put it there.")
