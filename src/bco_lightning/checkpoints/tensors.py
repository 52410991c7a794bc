"""Tensors in files: one process writes them, or each its parts; any number of others read them.

This is PyTorch's distributed checkpoint (DCP) over safetensors files, whose headers say which part of which tensor a
file holds. DCP's own format has an index that is pickled, and would run code when read.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from bco_lightning.errors import CheckpointError, NonFiniteError
from bco_lightning.parallel.collectives import max_over_ranks
from bco_lightning.parallel.sharding import is_cut, own_part

_FILE_BYTES = 2**30  # the writer holds one file at a time in memory
_DISABLED = "torch.distributed is disabled"  # which no_dist asks for


def write_tensors(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, dict[str, Any]]:
    """Writes tensors, and gives size and SHA-256 digest of each file that this process has written, by name.

    Where some are cut up, each process writes its parts, and all of them call this; what is not cut up, the first one
    has to give, and no other. An ``OSError`` in one is raised in all.
    """
    files = _HashedFiles()
    writer = HuggingFaceStorageWriter(str(folder), _numbers_of_files(tensors), save_distributed=True)
    writer.fs = files
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_DISABLED)
            save(_each_by_itself(tensors), storage_writer=writer, no_dist=not any(map(is_cut, tensors.values())))
    except CheckpointException as error:
        raise _cause_of(error) from error
    return files.written


def shapes_of(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and data type of each tensor in the files of a folder."""
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error
    shapes = {name: (about.size, about.properties.dtype) for name, about in found.items()}  # type: ignore[union-attr]
    # Where parts of a tensor lie is what the files say; far apart, they would make it larger than any memory.
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if sum(prod(size) * dtype.itemsize for size, dtype in shapes.values()) > stored:
        raise _unreadable(folder, ValueError("larger than the files"))
    return shapes


def read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fills tensors from files; where some are cut up, each process reads its parts, and all of them call this."""
    reader = HuggingFaceStorageReader(str(folder))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_DISABLED)
            load(tensors, storage_reader=reader, no_dist=not any(map(is_cut, tensors.values())))
    except CheckpointException as error:
        raise _unreadable(folder, _cause_of(error)) from error


class _HashedFiles(FileSystem):
    """Takes the digest of files while they are written."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with _HashedFile(io.FileIO(path, mode.replace("b", ""))) as file:
            yield file
        self.written[Path(path).name] = {"bytes": Path(path).stat().st_size, "sha256": file.digest.hexdigest()}


class _HashedFile(io.BufferedWriter):
    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return super().write(data)


def _numbers_of_files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which of a process's files a tensor goes into."""
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        part = own_part(tensor)
        if size and size + part.nbytes > _FILE_BYTES:
            number, size = number + 1, 0
        numbers[name], size = number, size + part.nbytes
    return numbers


def _each_by_itself(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In order and without shared memory, which safetensors refuses."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        memory = own_part(tensor).untyped_storage()
        shared = not is_cut(tensor) and (memory.data_ptr() in seen or memory.nbytes() != tensor.nbytes)
        seen.add(memory.data_ptr())
        found[name] = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
    return found


def _unreadable(folder: Path, error: BaseException) -> CheckpointError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(str(folder), f"expected the tensors of this model, found others ({said}).")


def _cause_of(error: CheckpointException) -> BaseException:
    causes = [cause for cause, _ in error.failures.values()]
    return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])


def refuse_not_finite(weights: Mapping[str, Any], step: int, trainer: Any) -> None:
    """Refuses, in every process, weights that would be of no use in a checkpoint."""
    broken = torch.tensor([not own_part(value).isfinite().all() for value in weights.values()], dtype=torch.uint8)
    if any(is_cut(value) for value in weights.values()):  # a process that went on alone would wait for the others
        broken = max_over_ranks(broken, trainer)
    if names := [name for name, is_broken in zip(weights, broken, strict=True) if is_broken]:
        problem = f"expected finite weights to save, found {names[0]} ({len(names)} parameters) not finite."
        remedy = "The checkpoints before are finite. A lower model.learning_rate often helps."
        raise NonFiniteError(f"optimizer step {step}", problem, remedy)


def leave_out_frozen(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A hook, for a method is called on the outermost module alone, and Lightning's weight averaging wraps modules."""
    for name in state.keys() - {prefix + name for name in module.trained_shapes()}:
        if name.startswith(prefix):
            del state[name]


def miss_trained_only(module: Any, found: Any) -> None:
    """A hook on loading: weights that are not trained lack in no checkpoint."""
    trained = module.trained_shapes()
    found.missing_keys[:] = [name for name in found.missing_keys if name.removeprefix("module.") in trained]
