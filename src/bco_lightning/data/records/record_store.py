"""Records of several files by their places; the blocks used last are kept."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from bco_lightning.data.records.record_file import Block, Place, Record, SeekableFile, changed
from bco_lightning.errors import FeedbackRowError

_OPEN_FILES = 64


class RecordStore:
    """Finds records again. It pickles to loader workers without what it keeps.

    Args:
        paths: Files as :func:`~bco_lightning.data.records.seekable_file` takes them.
        marks: Of each file its :meth:`SeekableFile.mark` when its places were taken.
        num_bytes: About how much memory blocks may take; one is kept in any case.
    """

    def __init__(self, paths: Sequence[str], marks: Sequence[str], num_bytes: int = 2**26) -> None:
        self._paths, self._marks, self._num_bytes = list(paths), list(marks), num_bytes
        self._files: OrderedDict[tuple[int, int], SeekableFile] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], Block] = OrderedDict()

    def __reduce__(self) -> tuple[type[RecordStore], tuple[Any, ...]]:
        return type(self), (self._paths, self._marks, self._num_bytes)

    @property
    def bytes_kept(self) -> int:
        """About how much memory blocks take."""
        return sum(block.num_bytes for block in self._blocks.values())

    def at(self, file: int, place: Place) -> Record | FeedbackRowError:
        """The record at a place, or what is wrong with it.

        Args:
            file: Number of the file.
            place: Where in it.

        Raises:
            FeedbackRowError: If the file cannot be read any more, or has changed since the place was taken.
        """
        known = self._file(file)
        key = file, int(known.units(np.array([place.offset]))[0])
        if key not in self._blocks:
            self._blocks[key] = known.block(key[1])
            while self.bytes_kept > self._num_bytes and len(self._blocks) > 1:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(key)
        return self._blocks[key].at(place)

    def _file(self, number: int) -> SeekableFile:
        from bco_lightning.data.records import seekable_file

        key = os.getpid(), number  # an open file has one position for a process and those forked from it
        if key not in self._files:
            file = seekable_file(self._paths[number])
            if file.mark() != self._marks[number]:
                raise changed(file.name)
            self._files[key] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(key)
        return self._files[key]
