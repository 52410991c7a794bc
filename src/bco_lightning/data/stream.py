"""Training rows that stay in their files: a table of their places, and rows read and tokenized when they are drawn."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
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
from bco_lightning.data.table import Array, RowTable, prompt_key
from bco_lightning.data.tokenize import RowTokenizer
from bco_lightning.errors import FeedbackRowError

_TRIES_IN_SOURCE, _TRIES, _AT_A_TIME = 50, 1000, 4096
_MALFORMED = "malformed"
_ROW_BYTES = 128  # that a row is counted as while it waits to be written
_WORKERS = 128  # that count in places of their own
_log = logging.getLogger("lightning.pytorch")


class RowPlace(NamedTuple):
    """Where a row stands: the number of its file, the place of its record there, and which row of that it is."""

    file: int
    offset: int
    line: int
    check: int
    part: int


class PlaceTable(RowTable):
    """Places of rows instead of their tokens: where a record is, in which file, and which row of the record it is."""

    schema = pa.schema(
        {
            "row_id": pa.int64(),
            "offset": pa.int64(),
            "line": pa.uint32(),
            "check": pa.uint32(),
            "file": pa.uint32(),
            "part": pa.uint16(),
            "thumbs_up": pa.bool_(),
            "source": pa.int16(),
        }
    )

    def __init__(self, folder: Path, sources: Sequence[str]) -> None:
        super().__init__(folder, sources)
        self.files: list[dict[str, Any]] = []
        self.told = {"files": self.files}

    def begin(self, files: Sequence[SeekableFile], source: int) -> int:
        """Adds the files of a source, and returns the number of the first."""
        self.files += [{"path": file.path, "mark": file.mark(), "source": source} for file in files]
        return len(self.files) - len(files)

    def append(self, row: FeedbackRow, source: int, outcome: Any) -> None:
        """Adds a row of the source with that number, with its :class:`RowPlace`."""
        self.note(row, source)
        self._add(_ROW_BYTES, **outcome._asdict(), thumbs_up=bool(row.thumbs_up), source=source)

    def counts(self, name: str, chosen: Array) -> RowCounts:
        """As of rows with tokens; which are cut is not known yet."""
        return replace(super().counts(name, chosen), cut={})

    def _place(self, batch: pa.RecordBatch, row: int) -> str:
        return place_of(batch.slice(row, 1).to_pylist()[0], self.files)


class StreamDataset(Dataset[dict[str, Any]]):
    """Rows of a stream, parsed and tokenized when they are asked for.

    A row that only its tokens show to be unusable is replaced by another of its class, and of its source while that has
    usable ones, which the seed and its number alone choose; so the shares of the classes stay. It pickles to loader
    workers, which count together with it.
    """

    def __init__(
        self, places: datasets.Dataset, files: Sequence[Mapping[str, Any]], makers: Sequence[RowMaker],
        row_tokenizer: RowTokenizer, options: DataOptions,
    ) -> None:  # fmt: skip
        self._places, self._files, self._makers = places, files, makers
        self._row_tokenizer, self._options = row_tokenizer, options
        self._store = RecordStore([file["path"] for file in files], [file["mark"] for file in files])
        self._replaced = torch.zeros(1 + _WORKERS, dtype=torch.int64).share_memory_()
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self._places)

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

    def regions(self) -> Array:
        """A number for each row of the neighbourhood that is best read together: rows of one have the same."""
        offsets, begins = self._column("offset"), np.zeros(len(self), bool)
        borders = np.searchsorted(self._column("file"), np.arange(len(self._files) + 1))
        for file, (start, stop) in zip(self._files, pairwise(borders), strict=True):
            if start < stop:
                begins[start:stop] = np.diff(seekable_file(file["path"]).units(offsets[start:stop]), prepend=-1) != 0
        return np.subtract(np.cumsum(begins, dtype=np.int32), 1)

    def place_of(self, number: int) -> str:
        """File and line of a row."""
        return place_of(self._known(number), self._files)

    def row(self, number: int) -> FeedbackRow:
        """One row, which may yet turn out to be unusable; a FeedbackRowError if its file has changed."""
        known = self._known(number)
        path, place = self._files[known["file"]]["path"], Place(*(known[name] for name in Place._fields))
        record = self._store.at(known["file"], place)
        if not isinstance(record, FeedbackRowError):
            images = ImageFinder.of(path, self._options)
            rows = self._makers[known["source"]].rows(record, place_of(known, self._files), images)
            found = rows[known["part"] :]
            if found and isinstance(found[0], FeedbackRow) and found[0].thumbs_up == known["thumbs_up"]:
                return found[0]
        raise changed(public_name(path))

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
                        "thumbs_up": row.thumbs_up, "source": self._known(number)["source"],
                        "prompt_key": prompt_key(row),
                        "prompt": words_of(row.prompt), "images": outcome.images,
                        "prompt_images": outcome.prompt_images,
                    }  # fmt: skip
                else:
                    self._note(row, outcome)
                    asked[at] = self._other(int(numbers[at]), tries)
            tries += 1
        return [samples[at] for at in range(len(numbers))]

    def _column(self, name: str) -> Array:
        return np.asarray(self._places.data.column(name))

    def _known(self, number: int) -> dict[str, Any]:
        # Four times as fast as asking the data set for its row.
        table = self._places.data
        return {name: table.column(name)[number].as_py() for name in table.column_names}

    @cached_property
    def _borders(self) -> list[int]:
        """The first row of each source, and the number of rows."""
        return np.searchsorted(self._column("source"), np.arange(len(self._makers) + 1)).tolist()  # type: ignore[no-any-return]

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
                self.place_of(number),
                f"expected a usable row in the place of this one, found {_TRIES} others that are not.",
                "See which rows are left out and why: python -m bco_lightning inspect.",
            )
        random, known = np.random.default_rng([self._options.row_seed, number, tries]), self._known(number)
        start, stop = 0, len(self)
        if tries < _TRIES_IN_SOURCE:
            start, stop = self._borders[known["source"] :][:2]
        begin, thumbs_up = int(random.integers(start, stop)), self._places.data.column("thumbs_up")
        # From a random row on, and from the front after the last, the first of the same class.
        for first in (*range(begin, stop, _AT_A_TIME), *range(start, begin, _AT_A_TIME)):
            alike = np.flatnonzero(np.asarray(thumbs_up[first : min(first + _AT_A_TIME, stop)]) == known["thumbs_up"])
            if len(alike):
                return int(first + alike[0])
        return number


def place_of(known: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> str:
    """File and line of a row, by what a table of places knows of it."""
    return place_in(public_name(files[known["file"]]["path"]), known["line"])


class WorkerRowError(FeedbackRowError):
    """An error in a loader worker, as the loader can raise it anew: it makes one of the text of a traceback alone."""

    message = "where, problem, remedy"  # torch 2.13 gives the text under this name where a type has such an attribute

    def __init__(self, where: str = "", problem: str = "", remedy: str = "", *, message: str = "") -> None:
        if message:
            where, _, problem = message.rpartition(f"{type(self).__name__}: ")[2].strip().partition(": ")
        super().__init__(where, problem, remedy)
