"""The table of blocks and the flags of rows, in a file that several processes map."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np

from bco_lightning.data.scratch_file import ScratchFile
from bco_lightning.data.streaming.blocks import BLOCK, Blocks
from bco_lightning.errors import FaultError


class IndexFile:
    """Flags of rows, then blocks; written once, then mapped. It pickles to loader workers by its path.

    Example:
        >>> file = IndexFile()
        >>> file.write_flags(bytes([1, 0]))
        >>> file.write_blocks(np.zeros(3, BLOCK))
        >>> file.flags.tolist(), len(file.blocks)
        ([1, 0], 3)
    """

    def __init__(self) -> None:
        file = ScratchFile(suffix=".index")
        self._sink = Path(file.path).open("wb", buffering=2**20)  # noqa: SIM115 (closed with the last block)
        weakref.finalize(self, self._sink.close)
        self._num_flags = self._num_blocks = 0
        self._keep(file)

    def write_flags(self, flags: bytes) -> None:
        """Adds the flags of the next rows."""
        self._sink.write(flags)
        self._num_flags += len(flags)

    def write_blocks(self, blocks: Blocks) -> None:
        """Adds all blocks; the file is complete then."""
        self._sink.write(blocks.tobytes())
        self._num_blocks = len(blocks)
        self._sink.close()
        self._map()

    def told(self) -> dict[str, Any]:
        """Plain values by which another process of this node maps the same file."""
        path = Path(self._path)
        return {
            "path": self._path,
            "inode": path.stat().st_ino,
            "num_flags": self._num_flags,
            "num_blocks": self._num_blocks,
        }

    @classmethod
    def shared(cls, told: dict[str, Any]) -> IndexFile:
        """Maps the file of another process.

        Raises:
            FaultError: If that file cannot be seen from here.
        """
        file = cls.__new__(cls)
        file._num_flags, file._num_blocks = told["num_flags"], told["num_blocks"]
        try:
            if Path(told["path"]).stat().st_ino != told["inode"]:  # another process has that number here
                raise FileNotFoundError(told["path"])
            file._keep(ScratchFile(shared=told["path"]))
        except OSError as error:
            raise FaultError(
                "processes",
                "expected those of a node to see each other's open files, found that this one cannot see the index "
                "that the first one has made.",
                "Start the processes of a node in one container, or each as a node of its own.",
            ) from error
        file._map()
        return file

    def _keep(self, file: ScratchFile) -> None:
        self._path = file.path
        weakref.finalize(self, file.remove)

    def _map(self) -> None:
        self.flags: np.ndarray[Any, Any] | None = None
        if self._num_flags:
            self.flags = np.asarray(np.memmap(self._path, np.uint8, "r", shape=(self._num_flags,)))
        self.blocks = np.asarray(np.memmap(self._path, BLOCK, "r", offset=self._num_flags, shape=(self._num_blocks,)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("_path", "_num_flags", "_num_blocks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()
