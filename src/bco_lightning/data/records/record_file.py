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

    num_bytes: int

    def at(self, place: Place) -> Record | FeedbackRowError:
        """The record at a place, or what is wrong with it.

        Raises:
            FeedbackRowError: If the file has changed since the place was taken.
        """


class SeekableFile(RecordFile):
    """A file whose records are found again by their place."""

    @abstractmethod
    def units(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers, growing with the offsets, of the neighbourhoods that are read together: shuffle these."""

    @abstractmethod
    def block(self, unit: int) -> Block:
        """The records of a neighbourhood.

        Raises:
            FeedbackRowError: If the file cannot be read any more.
        """

    @abstractmethod
    def mark(self) -> str:
        """What changes with the content where records have no check; else an empty text."""


def changed(name: str) -> FeedbackRowError:
    """The error for a file that has other records than when their places were taken."""
    return FeedbackRowError(
        name,
        "expected the records that it had when the run began, found others.",
        "Leave the files of a run as they are, and start it anew.",
    )
