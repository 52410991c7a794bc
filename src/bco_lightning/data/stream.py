"""Training rows that stay in their files: a table of their places, and rows read and tokenized when they are drawn."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from bco_lightning.batch import FeedbackRow, LeftOut, TokenizedSample
from bco_lightning.data.counts import RowCounts
from bco_lightning.data.images import ImageFinder
from bco_lightning.data.messages import words_of
from bco_lightning.data.options import DataOptions
from bco_lightning.data.records import RecordStore, seekable_file
from bco_lightning.data.records.record_file import Place, SeekableFile, changed
from bco_lightning.data.remote import place_in, public_name
from bco_lightning.data.rows import RowMaker
from bco_lightning.data.table import Array, RowLog, prompt_key
from bco_lightning.data.tokenize import RowTokenizer
from bco_lightning.errors import FeedbackRowError

# Of each row: where its record is, in which file; which row of the record it is; and its thumb.
_ROW = np.dtype([("offset", "i8"), ("line", "u4"), ("check", "u4"), ("file", "u4"), ("part", "u2"), ("up", "?")])
_PACKED = struct.Struct("<qIIIH?")  # the same
_TRIES_IN_SOURCE, _TRIES, _AT_A_TIME = 50, 1000, 4096
_MALFORMED = "malformed"
_WORKERS = 128  # that count in places of their own
_log = logging.getLogger("lightning.pytorch")


class RowPlace(NamedTuple):
    """Where a row stands: the number of its file, the place of its record there, and which row of the record it is."""

    file: int
    record: Place
    part: int


class PlaceTable(RowLog):
    """Places of rows on disk in the order of their sources, then divided as :class:`RowTable` divides rows."""

    def __init__(self, folder: Path, sources: Sequence[str]) -> None:
        super().__init__(sources)
        self._folder, self._draft = folder, folder / ".places"
        self._sink = self._draft.open("wb", buffering=2**20)
        self.files: list[dict[str, Any]] = []

    def begin(self, files: Sequence[SeekableFile], source: int) -> int:
        """Adds the files of a source, and returns the number of the first."""
        self.files += [{"path": file.path, "mark": file.mark(), "source": source} for file in files]
        return len(self.files) - len(files)

    def append(self, row: FeedbackRow, source: int, place: RowPlace) -> None:
        """Adds a row of the source with that number."""
        self.note(row, source)
        self._sink.write(_PACKED.pack(*place.record, place.file, place.part, bool(row.thumbs_up)))

    def divide(self, chosen: Mapping[str, Array]) -> dict[str, RowCounts]:
        """As :meth:`RowTable.divide`; what tokens alone tell is not known yet."""
        self._sink.close()
        counts, places, reasons = {}, np.fromfile(self._draft, _ROW), self.rows["reason"]
        for name, rows in chosen.items():
            counts[name] = self.counts(name, rows)
            counts[name].cut = {}
            for row in np.flatnonzero(rows & (reasons > 0)).tolist():
                counts[name].left_out[self.reasons[reasons[row]]].take(1, [_place_of(places[row], self.files)])
            places[rows & (reasons == 0)].tofile(self._folder / f"{name}.places")
        self._draft.unlink()
        return counts


class StreamRows:
    """Rows of a stream by number, as a table of their places on disk has them. It pickles by the path of that table."""

    def __init__(self, path: Path, files: Sequence[Mapping[str, Any]]) -> None:
        self.files, self._path = files, path
        self.places = np.memmap(path, _ROW, "r")

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamRows, (self._path, self.files)

    def __len__(self) -> int:
        return len(self.places)

    def column(self, name: str) -> Array:
        """The thumb (``thumbs_up``) or the number of the source (``source``) of each row."""
        if name == "thumbs_up":
            return np.array(self.places["up"])
        return np.repeat(np.array([file["source"] for file in self.files], np.int16), np.diff(self.borders))

    @cached_property
    def borders(self) -> list[int]:
        """The first row of each file, and the number of rows."""
        return np.searchsorted(self.places["file"], np.arange(len(self.files) + 1)).tolist()  # type: ignore[no-any-return]

    def range_of(self, source: int) -> range:
        """The rows of a source."""
        files = [number for number, file in enumerate(self.files) if file["source"] == source]
        return range(self.borders[files[0]], self.borders[files[-1] + 1])

    def place_of(self, number: int) -> str:
        """File and line of a row."""
        return _place_of(self.places[number], self.files)

    def regions(self) -> Array:
        """A number for each row of the neighbourhood that is best read together: rows of one have the same."""
        begins = np.zeros(len(self), bool)
        for file, (start, stop) in zip(self.files, pairwise(self.borders), strict=True):
            if start < stop:
                units = seekable_file(file["path"]).units(self.places["offset"][start:stop])
                begins[start:stop] = np.diff(units, prepend=-1) != 0
        return np.subtract(np.cumsum(begins, dtype=np.int32), 1)

    def drawn_evenly(self, count: int) -> list[int]:
        """Numbers of about ``count`` rows, in a thousand runs of neighbours from all over."""
        length = min(-(-count // 1000), len(self))
        starts = np.linspace(0, len(self) - length, -(-count // length)).astype(np.int64)
        numbers: list[int] = np.unique(starts[:, None] + np.arange(length)).tolist()
        return numbers


class StreamDataset(Dataset[dict[str, Any]]):
    """Rows of a stream, parsed and tokenized when they are asked for.

    A row that only its tokens show to be unusable is replaced by another of its class, and of its source while that has
    usable ones, which the seed and its number alone choose; so the shares of the classes stay. It pickles to loader
    workers, which count together with it.
    """

    def __init__(
        self, rows: StreamRows, makers: Sequence[RowMaker], row_tokenizer: RowTokenizer, options: DataOptions
    ) -> None:
        self.rows, self._makers, self._row_tokenizer, self._options = rows, makers, row_tokenizer, options
        self._store = RecordStore([file["path"] for file in rows.files], [file["mark"] for file in rows.files])
        self._replaced = torch.zeros(1 + _WORKERS, dtype=torch.int64).share_memory_()
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One row, or the one in its place."""
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Rows as :func:`collate` takes them, in the order asked for."""
        if get_worker_info() is None:
            return self._usable(numbers)
        # Threads of the tokenizer do not outlive a fork; workers are enough.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            return self._usable(numbers)
        except FeedbackRowError as error:
            raise WorkerRowError(error.where, error.problem, error.remedy) from None

    @property
    def num_replaced(self) -> int:
        """Rows that were unusable when their turn came, here and in all loader workers."""
        return int(self._replaced.sum())

    def row(self, number: int) -> FeedbackRow:
        """One row, which may yet turn out to be unusable; a FeedbackRowError if its file has changed."""
        known = self.rows.places[number]
        file = self.rows.files[known["file"]]
        record = self._store.at(int(known["file"]), Place(*(int(known[name]) for name in Place._fields)))
        if not isinstance(record, FeedbackRowError):
            images = ImageFinder.of(file["path"], self._options)
            rows = self._makers[file["source"]].rows(record, self.rows.place_of(number), images)
            found = rows[known["part"] :]
            if found and isinstance(found[0], FeedbackRow) and found[0].thumbs_up == known["up"]:
                return found[0]
        raise changed(public_name(file["path"]))

    def _usable(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        samples: dict[int, dict[str, Any]] = {}
        asked, tries = dict(enumerate(map(int, numbers))), 0
        while asked:
            outcomes = self._row_tokenizer.tokenize([self.row(number) for number in asked.values()])
            for at, (row, outcome) in zip(list(asked), outcomes, strict=True):
                number = asked.pop(at)
                if isinstance(outcome, TokenizedSample):
                    samples[at] = {
                        "row_id": number, "input_ids": outcome.input_ids, "completion_mask": outcome.completion_mask,
                        "thumbs_up": row.thumbs_up, "source": self._source(number), "prompt_key": prompt_key(row),
                        "prompt": words_of(row.prompt), "images": outcome.images,
                    }  # fmt: skip
                else:
                    self._note(row, outcome)
                    asked[at] = self._other(int(numbers[at]), tries)
            tries += 1
        return [samples[at] for at in range(len(numbers))]

    def _source(self, number: int) -> int:
        return int(self.rows.files[self.rows.places[number]["file"]]["source"])

    def _note(self, row: FeedbackRow, outcome: LeftOut | FeedbackRowError) -> None:
        if isinstance(outcome, FeedbackRowError) and self._options.bad_rows == "strict":
            raise outcome
        worker = get_worker_info()
        self._replaced[0 if worker is None else 1 + worker.id % _WORKERS] += 1
        reason = outcome.reason if isinstance(outcome, LeftOut) else _MALFORMED
        if reason not in self._told:
            self._told.add(reason)
            said = "stream: %s is replaced by another row of its class, and so is each like it: %s"
            _log.warning(said, row.place, reason)

    def _other(self, number: int, tries: int) -> int:
        """The row to try next in the place of one."""
        if tries >= _TRIES:
            raise FeedbackRowError(
                self.rows.place_of(number),
                f"expected a usable row in the place of this one, found {_TRIES} others that are not.",
                "See which rows are left out and why: python -m bco_lightning inspect.",
            )
        places, random = self.rows.places, np.random.default_rng([self._options.row_seed, number, tries])
        rows = self.rows.range_of(self._source(number)) if tries < _TRIES_IN_SOURCE else range(len(places))
        begin = int(random.integers(rows.start, rows.stop))
        # From a random row on, and from the front after the last, the first of the same class.
        for first in (*range(begin, rows.stop, _AT_A_TIME), *range(rows.start, begin, _AT_A_TIME)):
            alike = np.flatnonzero(places["up"][first : min(first + _AT_A_TIME, rows.stop)] == places["up"][number])
            if len(alike):
                return int(first + alike[0])
        return number


def _place_of(known: Any, files: Sequence[Mapping[str, Any]]) -> str:
    return place_in(public_name(files[known["file"]]["path"]), known["line"])


class WorkerRowError(FeedbackRowError):
    """An error in a loader worker, as the loader can raise it anew: it makes one of the text of a traceback alone."""

    message = "where, problem, remedy"  # torch 2.13 gives the text under this name where a type has such an attribute

    def __init__(self, where: str = "", problem: str = "", remedy: str = "", *, message: str = "") -> None:
        if message:
            where, _, problem = message.rpartition(f"{type(self).__name__}: ")[2].strip().partition(": ")
        super().__init__(where, problem, remedy)
