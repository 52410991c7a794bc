"""Tensors that are spread over processes, in files: each process writes its parts, any number of others read them.

This is PyTorch's distributed checkpoint (DCP) over safetensors files, whose headers say which part of which tensor a
file holds. DCP's own format has an index that is pickled, and would run code when read.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bco_lightning.errors import CheckpointError

_SUFFIX = ".safetensors"
_WEIGHTS, _MOMENTS = "state_dict", "optimizer_states"


def take_shards(checkpoint: dict[str, Any], is_cut: Callable[[Any], bool]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Takes the tensors that are spread over processes out of a checkpoint.

    Args:
        checkpoint: With ``state_dict`` and ``optimizer_states``, whose parameters are numbered.
        is_cut: Whether a value is such a tensor.

    Returns:
        The checkpoint without them; and them, by names that :func:`put_shards` understands.
    """
    shards: dict[str, Tensor] = {}

    def rest(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        shards.update({f"{prefix}/{name}": value for name, value in values.items() if is_cut(value)})
        return {name: value for name, value in values.items() if not is_cut(value)}

    optimizers = [
        {**state, "state": {at: rest(moments, f"{_MOMENTS}/{i}/{at}") for at, moments in state["state"].items()}}
        for i, state in enumerate(checkpoint.get(_MOMENTS, []))
    ]
    weights = rest(checkpoint[_WEIGHTS], _WEIGHTS)
    return {**checkpoint, _WEIGHTS: weights, **({_MOMENTS: optimizers} if optimizers else {})}, shards


def put_shards(checkpoint: dict[str, Any], shards: Mapping[str, Tensor]) -> None:
    """Puts tensors back where :func:`take_shards` found them.

    Raises:
        CheckpointError: If they belong to no such checkpoint.
    """
    for key, value in shards.items():
        kind, _, rest = key.partition("/")
        try:
            if kind == _WEIGHTS:
                checkpoint[_WEIGHTS][rest] = value
            else:
                optimizer, number, name = rest.split("/")
                checkpoint[_MOMENTS][int(optimizer)]["state"].setdefault(int(number), {})[name] = value
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError("checkpoint", f"expected a tensor of its own, found {key[:60]!r}.") from error


def parameter_of(key: str, names: list[str]) -> str | None:
    """The name of the parameter that a tensor belongs to, moments to one of ``names``; ``None`` if there is none."""
    kind, _, rest = key.partition("/")
    if kind == _WEIGHTS:
        return rest
    number = re.fullmatch(r"\d+/(\d+)/\w+", rest)
    return names[int(number[1])] if number and int(number[1]) < len(names) else None


def is_moment(key: str) -> bool:
    """Whether a tensor belongs to an optimizer."""
    return key.startswith(_MOMENTS)


def is_part(name: str) -> bool:
    """Whether a file of a checkpoint holds parts of tensors."""
    return name.endswith(_SUFFIX)


def has_shards(folder: Path) -> bool:
    """Whether a checkpoint's folder holds parts of tensors."""
    return any(folder.glob(f"*{_SUFFIX}"))


def write_shards(shards: Mapping[str, Any], folder: Path) -> None:
    """Writes what this process has of each tensor; a collective.

    Raises:
        OSError: In every process, if one cannot write.
    """
    try:
        save(dict(shards), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise _os_error_of(error) from error


def files_of(rank: int, folder: Path) -> list[Path]:
    """The files that a process has written."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*{_SUFFIX}"))


def shapes_of(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and data type of each tensor in the files of a folder.

    Raises:
        CheckpointError: If the files are none that :func:`write_shards` wrote.
    """
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, ValueError, KeyError) as error:
        raise _unreadable(folder, error) from error
    return {name: (about.size, about.properties.dtype) for name, about in found.items()}  # type: ignore[union-attr]


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors in the files of a folder, put together; no collective.

    Raises:
        CheckpointError: If the files are none that :func:`write_shards` wrote.
    """
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in shapes_of(folder).items()}
    _read(folder, tensors, no_dist=True)
    return tensors


def read_shards(folder: Path, parts: dict[str, Any]) -> None:
    """Fills tensors, each spread over the processes as it is, from files; a collective.

    Raises:
        CheckpointError: In every process, if a tensor lacks, is of another shape, or a file is unreadable.
    """
    _read(folder, parts, no_dist=False)


def _read(folder: Path, parts: dict[str, Any], *, no_dist: bool) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as no_dist says
            load(parts, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=no_dist)
    except CheckpointException as error:
        raise _unreadable(folder, next(iter(error.failures.values()))[0]) from error


def _unreadable(folder: Path, error: BaseException) -> CheckpointError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(str(folder), f"expected the tensors of this model, found others ({said}).")


def _os_error_of(error: CheckpointException) -> BaseException:
    for failure, _ in error.failures.values():
        if isinstance(failure, OSError):
            return failure
    return RuntimeError(str(error))
