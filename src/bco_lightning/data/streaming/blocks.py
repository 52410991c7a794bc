"""Blocks: neighbouring records of a file that are read together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bco_lightning.data.records import Record
from bco_lightning.errors import FeedbackRowError

BLOCK_ROWS, BLOCK_BYTES = 256, 2**18
# Of each block: its source and file; where it begins and ends there (bytes or rows); the lines of the file before it;
# the rows of all sources before it, and its own; those of each thumb; whether it may be read apart from the one before;
# a checksum of its bytes, where it has bytes of its own.
_WIDE, _NARROW = ("start", "stop", "line", "first_row"), ("source", "file", "rows", "up", "down", "apart")
BLOCK = np.dtype([*((name, "i8") for name in _WIDE), *((name, "i4") for name in _NARROW), ("check", "u4")])
Blocks = np.ndarray[Any, Any]


class Content(Protocol):
    """The records of a block, or some of them."""

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""

    @property
    def check(self) -> int:
        """Checksum of the bytes of the block; 0 where it has none of its own."""

    def __len__(self) -> int: ...

    def line(self, number: int) -> int:
        """Line of a record, from 0 at the first line of the block."""

    def record(self, number: int, place: str) -> Record:
        """One record.

        Raises:
            FeedbackRowError: If it is malformed; ``place`` says where.
        """

    def records(self) -> Iterator[tuple[int, Callable[[str], Record]]]:
        """Every record, as its line and a function that takes the place and gives what :meth:`record` does."""

    def only(self, numbers: list[int]) -> Content:
        """Some of the records, under the numbers that they had."""


@dataclass(frozen=True)
class Piece:
    """Some blocks that follow each other.

    Args:
        blocks: Their places in the file; ``line`` counts from the first line of the piece, ``rows`` are records.
        num_lines: Lines of the piece, blank ones too.
        digest: Of the bytes that were read; empty if none were.
        contents: Gives the content of each block.
    """

    blocks: Blocks
    num_lines: int
    digest: bytes
    contents: Callable[[], Iterator[Content]]


class RecordFile(Protocol):
    """A file whose records can be read from the middle."""

    def borders(self) -> list[int]:
        """Where the file may be cut into pieces, begin and end included."""

    def piece(self, start: int, stop: int) -> Piece:
        """The blocks that begin between two borders."""

    def content(self, start: int, stop: int) -> Content:
        """The records of one block."""

    def fingerprint(self) -> str:
        """What tells its content without reading all of it."""


def cut_evenly(start: int, stop: int, rows: int, unit_rows: int) -> Blocks:
    """Blocks of ``rows`` rows between two rows of a file, which can be read apart from each other every ``unit_rows``.

    Example:
        >>> cut_evenly(10, 15, 2, 4)[["start", "stop", "line", "rows", "apart"]].tolist()
        [(10, 12, 0, 2, 1), (12, 14, 2, 2, 0), (14, 15, 4, 1, 1)]
    """
    starts = np.arange(start, stop, rows)
    blocks = np.zeros(len(starts), BLOCK)
    blocks["start"], blocks["stop"] = starts, np.minimum(starts + rows, stop)
    blocks["line"], blocks["rows"] = starts - start, blocks["stop"] - starts
    units = (starts - start) // max(1, unit_rows)
    blocks["apart"] = np.diff(units, prepend=-1) > 0
    return blocks


def changed(path: str) -> FeedbackRowError:
    """A file that has other records than it was indexed with."""
    return FeedbackRowError(
        path,
        "expected the records that it had when the run began, found others.",
        "Leave the files of a run as they are, and start it anew.",
    )
