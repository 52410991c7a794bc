"""What is in the folder of a checkpoint: tensors in safetensors files, plain values in JSON, a manifest of both."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from bco_lightning.checkpoints.choosing import require_folder, saved_steps
from bco_lightning.checkpoints.folders import discard, written_whole
from bco_lightning.checkpoints.manifest import verify_checkpoint, write_manifest
from bco_lightning.checkpoints.tensors import read_tensors, shapes_of, write_tensors
from bco_lightning.errors import CheckpointError
from bco_lightning.parallel.collectives import Processes, errors_of_all, gather_over_ranks
from bco_lightning.parallel.sharding import is_cut

VALUES_FILE = "values.json"
_TOLD = ("fingerprints", "config_digest", "versions", "accepted_changes")
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
        """Writes ``checkpoint`` into the folder ``path``; errors as for :func:`write_checkpoint`."""
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
        """Reads a checkpoint onto the CPU, in every process; errors and other arguments as for :func:`read_checkpoint`.

        Args:
            path: Folder of a step.
            map_location: Not looked at.
            weights_only: Taken as true whatever is given.
            weights: Weights that are cut up.
            moments: Whether the optimizer's state is wanted.
        """
        folder, everyone = Path(path), Processes.all()
        share = (everyone.global_rank, everyone.world_size) if weights is not None else (0, 1)
        while True:
            errors: list[Exception] = []
            try:
                require_folder(folder)
                verify_checkpoint(folder, share)
            except CheckpointError as error:
                errors.append(error)
            errors = errors_of_all(errors, everyone)
            if not errors:
                return _read(folder, weights, moments)
            earlier = [step for step in saved_steps(folder.parent) if step.name < folder.name]
            if not (self.may_fall_back and earlier):
                raise errors[0]
            rank_zero_info(f"checkpoint: skipped {errors[0]}")
            folder = earlier[-1]

    @override
    def remove_checkpoint(self, path: Any) -> None:
        """Removes a checkpoint; a half-removed one has no checkpoint's name any more."""
        discard(Path(path))


def write_checkpoint(checkpoint: Mapping[str, Any], target: Path) -> None:
    """Writes a checkpoint into the folder ``target``, whole or not at all.

    Where tensors are cut up, all processes call this, and each writes its parts; else one of them.

    Args:
        checkpoint: Tensors and plain values. The step, and what the run is made of, are copied into the manifest, where
            they can be read without loading anything else.
        target: Folder to write; one that is there already is replaced.

    Raises:
        CheckpointError: If the disk is full or cannot be written, or a value is none that can be read back; ``target``
            is then as it was before. Where several processes write, in all of them.
    """
    tensors: dict[str, Tensor] = {}
    values = _taken_apart(checkpoint, "", tensors)
    writers = Processes.all() if any(map(is_cut, tensors.values())) else Processes()
    first, errors = writers.global_rank == 0, list[Exception]()
    own = tensors if first else {name: value for name, value in tensors.items() if is_cut(value)}

    def finish(folder: Path, files: dict[str, Any]) -> None:
        written = json.dumps(values).encode()
        (folder / VALUES_FILE).write_bytes(written)
        files[VALUES_FILE] = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
        told = {key: checkpoint[key] for key in _TOLD if key in checkpoint}
        write_manifest(folder, {"step": checkpoint.get("global_step"), **told}, files)

    try:
        with written_whole(target) if first else nullcontext(target) as partial:
            folder = gather_over_ranks(partial, writers)[0]
            _by_all(lambda: folder.mkdir() if first else None, writers)
            files = _by_all(lambda: write_tensors(own, folder), writers)
            all_files = {name: facts for part in gather_over_ranks(files, writers) for name, facts in part.items()}
            _by_all(lambda: finish(folder, all_files) if first else None, writers)
    except Exception as error:
        errors.append(_in_words(target, error))
    for told in errors_of_all(errors, writers):
        raise told


def read_checkpoint(path: Path | str, *, moments: bool = True) -> dict[str, Any]:
    """Verifies and reads a checkpoint, whole; no other process is asked.

    Args:
        path: Folder of a step; never a URL.
        moments: Whether the optimizer's state is wanted.

    Returns:
        What was saved, tensors on the CPU.

    Raises:
        CheckpointError: If it is missing, incomplete, changed or unreadable.
        UnsafeCheckpointError: If it is a file, which could run code when read.
    """
    folder = Path(path)
    if "://" in str(path):
        raise CheckpointError(str(path), "expected a local checkpoint, found a URL.", "Fetch it first.")
    require_folder(folder)
    verify_checkpoint(folder)
    return _read(folder, None, moments)


def _read(folder: Path, weights: Mapping[str, Tensor] | None, moments: bool) -> dict[str, Any]:
    """A tensor under the name of a weight, and of its shape, is cut up like it."""
    shapes, tensors = shapes_of(folder), dict[str, Tensor]()

    def room_for(key: str) -> Tensor:
        shape, dtype = shapes[key]
        weight = next((weights[part] for part in key.split("/") if part in weights), None) if weights else None
        if weight is not None and weight.shape == shape:
            tensors[key] = torch.empty_like(weight, dtype=dtype)
        else:
            tensors[key] = torch.zeros(shape, dtype=dtype)
        return tensors[key]

    try:
        values = json.loads((folder / VALUES_FILE).read_bytes())
        if not moments:
            values.pop("optimizer_states", None)
        checkpoint = _put_together(values, room_for)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            str(folder / VALUES_FILE), "expected plain values and names of tensors, found something else."
        ) from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(str(folder), f"expected a checkpoint, found a {type(checkpoint).__name__}.")
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
    raise CheckpointError(
        f"checkpoint, {path}",
        f"expected tensors, numbers, texts, lists and dictionaries, found a {type(value).__name__}.",
        "A callback may have put it there.",
    )


def _put_together(value: Any, room_for: Callable[[str], Tensor]) -> Any:
    """The inverse of :func:`_taken_apart`."""
    if isinstance(value, list):
        return [_put_together(each, room_for) for each in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return room_for(value[_TENSOR])
    if _TUPLE in value:
        return tuple(_put_together(value[_TUPLE], room_for))
    if _DICT in value:
        return {_put_together(key, room_for): _put_together(each, room_for) for key, each in value[_DICT]}
    return {key: _put_together(each, room_for) for key, each in value.items()}


def _by_all(act: Callable[[], Any], writers: Processes) -> Any:
    """What each process does; where it fails in one of them, it fails in all."""
    result, errors = None, list[Exception]()
    try:
        result = act()
    except Exception as error:
        errors.append(error)
    for told in errors_of_all(errors, writers):
        raise told
    return result


def _in_words(target: Path, error: Exception) -> Exception:
    if not isinstance(error, OSError):
        return error
    remedy = "Give a run_folder that can be written."
    if error.errno in _NO_SPACE:
        remedy = "Free some space, or lower checkpoint.keep; the checkpoints written before are whole."
    return CheckpointError(
        str(target), f"expected to write a checkpoint, found that {error.strerror or error}.", remedy
    )
