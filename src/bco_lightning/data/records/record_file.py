"""What every kind of file gives: records, each with a place that is cheap to keep and by which some find it again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bco_lightning.data.remote import public_name
from bco_lightning.data.values import Record
from bco_lightning.errors import FeedbackRowError


class Place(NamedTuple):
    """Where a record stands: its first byte (JSON lines) or the rows before it; its line from 1; CRC-32 of a line."""

    offset: int
    line: int
    check: int = 0


Read = Iterator[tuple[Place, Record | FeedbackRowError]]


class RecordFile:
    """One file of records, as :func:`~bco_lightning.data.files.expand` gives its path.

    Iterating reads it through in bounded memory: each record, or what is wrong with it, with its place. A file that is
    malformed as a whole, or from some place on, raises a FeedbackRowError.
    """

    def __init__(self, path: str, read: Callable[[Any], Read]) -> None:
        self.path, self.name, self._read = path, public_name(path), read

    def __iter__(self) -> Read:
        return self._read(self)


class Block(NamedTuple):
    """Neighbouring records that are held together; ``at`` gives one, or what is wrong with it, by its place."""

    num_bytes: int
    at: Callable[[Place], Record | FeedbackRowError]


class SeekableFile(RecordFile):
    """A file whose records are found again by their place."""

    @abstractmethod
    def units(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers, growing with the offsets, of the neighbourhoods that are read together: shuffle these."""

    @abstractmethod
    def block(self, unit: int) -> Block:
        """The records of a neighbourhood."""

    def mark(self) -> str:
        """What changes with the content where records have no check; else an empty text."""
        return ""


def changed(name: str) -> FeedbackRowError:
    """The error for a file that has other records than when their places were taken."""
    found = "expected the records that it had when the run began, found others."
    return FeedbackRowError(name, found, "Leave the files of a run as they are, and start it anew.")
