"""What every kind of file gives: records, each with a place that is cheap to keep and by which some find it again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bco_lightning.data.remote import public_name
from bco_lightning.errors import FeedbackRowError

Record = Mapping[str, Any]


class Place(NamedTuple):
    """Where a record stands in its file.

    Args:
        offset: By what it is found again: its first byte (JSON lines), else the number of rows before it.
        line: Its line or row from 1, for messages; of a CSV row of several lines the last.
        check: CRC-32 of its bytes; 0 where the file's mark stands for all records.
    """

    offset: int
    line: int
    check: int = 0


Read = Iterator[tuple[Place, "Record | FeedbackRowError"]]


class RecordFile(ABC):
    """One file of records.

    Args:
        path: As :func:`~bco_lightning.data.files.expand` gives it.
    """

    def __init__(self, path: str) -> None:
        self.path, self.name = path, public_name(path)

    @abstractmethod
    def __iter__(self) -> Read:
        """Reads it through, in bounded memory: each record, or what is wrong with it, with its place.

        Raises:
            FeedbackRowError: If the file is malformed as a whole, or from some place on.
        """


class Block(Protocol):
    """Neighbouring records of a file that are held together."""

    @property
    def num_bytes(self) -> int:
        """About what they take in memory."""

    def at(self, place: Place) -> Record | FeedbackRowError:
        """The record at a place, or what is wrong with it.

        Raises:
            FeedbackRowError: If the file has changed since the place was taken.
        """


class Piece(Protocol):
    """A part of a file that can be read without the rest.

    Lines of places, and of errors, count from the first of the piece where ``num_lines`` is not 0: the ``num_lines``
    of the pieces before are to be added.
    """

    num_lines: int  # those read so far, blank ones too; 0 where rows say their number themselves

    def __iter__(self) -> Read:
        """Reads it through, as a file is read."""


class SeekableFile(RecordFile):
    """A file whose records are found again by their place."""

    @abstractmethod
    def pieces(self) -> list[tuple[int, int]]:
        """Begin and end of parts that can be read without each other."""

    @abstractmethod
    def piece(self, start: int, stop: int) -> Piece:
        """One of the parts."""

    @abstractmethod
    def units(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers, growing with the offsets, of the neighbourhoods that are best read together: shuffle these."""

    @abstractmethod
    def block_of(self, offset: int) -> int:
        """Key of the block that holds a record."""

    @abstractmethod
    def blocks(self, key: int) -> dict[int, Block]:
        """That block by its key, and others that were met on the way to it.

        Raises:
            FeedbackRowError: If the file cannot be read any more.
        """

    @abstractmethod
    def mark(self) -> str:
        """What changes with the content where records have no check; else an empty text."""

    def __iter__(self) -> Read:
        """Reads it through."""
        for start, stop in self.pieces():
            yield from self.piece(start, stop)


def changed(name: str) -> FeedbackRowError:
    """The error for a file that has other records than it was indexed with."""
    return FeedbackRowError(
        name,
        "expected the records that it had when the run began, found others.",
        "Leave the files of a run as they are, and start it anew.",
    )
