"""Tokenized rows on disk, written one after the other and then divided into data sets, 17 bytes a row in memory."""

from __future__ import annotations

import hashlib
import json
import weakref
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from bco_lightning.batch import FeedbackRow, TokenizedSample
from bco_lightning.data.row_counts import RowCounts
from bco_lightning.data.scratch_file import ScratchFile
from bco_lightning.errors import FaultError

_UP, _DOWN, _DROPPED, _PROMPT_CUT, _COMPLETION_CUT = (1 << bit for bit in range(5))
_BATCH_ROWS, _BATCH_BYTES = 128, 2**20
# Opening a file touches each of its batches, and every touch makes some pages of it resident.
_FINAL_BATCH_BYTES = 2**23
_COLUMNS = {
    "input_ids": pa.list_(pa.int32()),
    "completion_mask": pa.list_(pa.bool_()),
    "thumbs_up": pa.bool_(),
    "prompt": pa.string(),
    "place": pa.string(),
}
_DRAFT = pa.schema({**_COLUMNS, "content": pa.binary()})
_FINAL = pa.schema({"row_id": pa.int64(), **_COLUMNS})


@dataclass
class RowSet:
    """Some rows of a table, as they are trained on or scored.

    Args:
        counts: What became of them.
        dataset: Those that are used, memory-mapped; ``None`` if there are none.
        digest: SHA-256 over prompt, completion and thumb of every row, whether it is used or not.
    """

    counts: RowCounts
    dataset: Dataset | None = None
    digest: str = ""

    def told(self) -> dict[str, Any]:
        """Plain values by which another process of this node gets the same rows; there have to be some."""
        path = self.dataset.cache_files[0]["filename"]  # type: ignore[union-attr]
        return {"counts": asdict(self.counts), "digest": self.digest, "path": path, "inode": Path(path).stat().st_ino}

    @classmethod
    def shared(cls, told: Mapping[str, Any]) -> RowSet:
        """Maps the rows of another process, from the same file.

        Raises:
            FaultError: If that file cannot be seen from here.
        """
        try:
            if Path(told["path"]).stat().st_ino != told["inode"]:  # another process has that number here
                raise FileNotFoundError(told["path"])
            dataset = _mapped(ScratchFile(shared=told["path"]))
        except OSError as error:
            raise FaultError(
                "processes",
                "expected those of a node to see each other's open files, found that this one cannot see the rows "
                "that the first one has read.",
                "Start the processes of a node in one container, or each as a node of its own.",
            ) from error
        return cls(RowCounts(**told["counts"]), dataset, told["digest"])


class RowTable:
    """Rows in the order of their sources; a context manager that leaves nothing but the data sets made from it.

    Args:
        seed: Seed of the keys by which prompts are held out.
    """

    def __init__(self, seed: int) -> None:
        self._seed, self._file = seed, ScratchFile()
        self._sink = pa.OSFile(self._file.path, "wb")
        self._writer = pa.ipc.new_stream(self._sink, _DRAFT)
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        self._prompt_keys, self._answer_keys, self._flags = array("Q"), array("Q"), array("B")

    def __enter__(self) -> RowTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._sink.close()
        self._file.remove()

    def __len__(self) -> int:
        return len(self._flags)

    @property
    def prompt_keys(self) -> np.ndarray[Any, Any]:
        """A number for each row's prompt, in seeded random order."""
        return np.frombuffer(self._prompt_keys, dtype=np.uint64)

    @property
    def answer_keys(self) -> np.ndarray[Any, Any]:
        """A number for each row's prompt and completion."""
        return np.frombuffer(self._answer_keys, dtype=np.uint64)

    @property
    def thumbs_up(self) -> np.ndarray[Any, Any]:
        """Whether each row has thumbs-up."""
        return self._has(_UP)

    def append(self, row: FeedbackRow, sample: TokenizedSample | None) -> None:
        """Adds a row, without a sample if it is dropped."""
        content = json.dumps([row.prompt, row.completion, row.thumbs_up], default=str).encode()
        self._prompt_keys.append(prompt_key(row, self._seed))
        self._answer_keys.append(_first_bytes(hashlib.sha256(content[: content.rindex(b",")])))
        self._flags.append(_flags_of(row, sample))
        self._pending.append(
            {
                "input_ids": sample and sample.input_ids,
                "completion_mask": sample and sample.completion_mask,
                "thumbs_up": row.thumbs_up,
                "prompt": json.dumps(row.prompt, ensure_ascii=False, default=str),
                "place": row.place,
                "content": content,
            }
        )
        self._pending_bytes += len(content)
        if len(self._pending) >= _BATCH_ROWS or self._pending_bytes >= _BATCH_BYTES:
            self._flush()

    def divide(self, chosen: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, RowSet]:
        """Makes a data set of each named choice of rows; the table is complete then."""
        self._flush()
        self._writer.close()
        self._sink.close()
        makers = {name: _RowSetMaker(self._counts(name, rows)) for name, rows in chosen.items()}
        start = 0
        for batch in self._batches():
            dropped = self._has(_DROPPED)[start : start + len(batch)]
            for name, maker in makers.items():
                maker.take(batch, chosen[name][start : start + len(batch)], dropped)
            start += len(batch)
        row_sets = {name: maker.finish() for name, maker in makers.items()}
        pa.default_memory_pool().release_unused()
        return row_sets

    def _batches(self) -> Iterator[pa.RecordBatch]:
        # Read, not memory-mapped: what passes through should not stay in resident memory.
        with pa.OSFile(self._file.path) as file:
            yield from pa.ipc.open_stream(file)

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._pending, schema=_DRAFT))
        self._pending, self._pending_bytes = [], 0

    def _counts(self, name: str, chosen: np.ndarray[Any, Any]) -> RowCounts:
        used = chosen & ~self._has(_DROPPED)
        return RowCounts(
            name,
            read=int(chosen.sum()),
            up=int((used & self._has(_UP)).sum()),
            down=int((used & self._has(_DOWN)).sum()),
            dropped=int((chosen & ~used).sum()),
            prompt_cut=int((used & self._has(_PROMPT_CUT)).sum()),
            completion_cut=int((used & self._has(_COMPLETION_CUT)).sum()),
        )

    def _has(self, flag: int) -> np.ndarray[Any, Any]:
        return (np.frombuffer(self._flags, dtype=np.uint8) & flag) > 0


@dataclass
class _RowSetMaker:
    """Writes the used rows of a choice to a file of their own, batch by batch."""

    counts: RowCounts
    _file: ScratchFile = field(default_factory=lambda: ScratchFile())
    _digest: Any = field(default_factory=hashlib.sha256)
    _written: int = 0
    _pending: list[pa.RecordBatch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._writer = pa.ipc.new_stream(self._file.path, _FINAL)

    def take(self, batch: pa.RecordBatch, chosen: np.ndarray[Any, Any], dropped: np.ndarray[Any, Any]) -> None:
        for content in batch.column("content").filter(pa.array(chosen)):
            self._digest.update(content.as_buffer())
        if (chosen & dropped).any():
            places = batch.column("place").filter(pa.array(chosen & dropped)).to_pylist()
            self.counts.dropped_places = [*self.counts.dropped_places, *places][:3]
        used = batch.filter(pa.array(chosen & ~dropped))
        if len(used):
            row_ids = pa.array(np.arange(self._written, self._written + len(used)))
            columns = [row_ids, *(used.column(name) for name in _COLUMNS)]
            self._pending.append(pa.RecordBatch.from_arrays(columns, schema=_FINAL))
            self._written += len(used)
        if sum(part.nbytes for part in self._pending) >= _FINAL_BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_batches(self._pending, schema=_FINAL).combine_chunks())
        self._pending = []

    def finish(self) -> RowSet:
        self._flush()
        self._writer.close()
        row_set = RowSet(self.counts, digest=self._digest.hexdigest())
        if not self._written:
            self._file.remove()
            return row_set
        row_set.dataset = _mapped(self._file)
        return row_set


def _mapped(file: ScratchFile) -> Dataset:
    """The rows of a file, which is kept as long as they are."""
    dataset = Dataset.from_file(file.path)
    weakref.finalize(dataset, file.remove)
    return dataset


def prompt_key(row: FeedbackRow, seed: int) -> int:
    """The first eight bytes of a seeded hash of what is said in the prompt."""
    said = [(message["role"], message["content"]) for message in row.prompt]
    return _first_bytes(hashlib.sha256(f"{seed}\n{json.dumps(said)}".encode()))


def held_out_prompts(prompt_keys: np.ndarray[Any, Any], fraction: float) -> np.ndarray[Any, Any]:
    """Which rows have one of the prompts to hold out.

    Args:
        prompt_keys: The seeded key of each row's prompt.
        fraction: Share of the distinct prompts to hold out, rounded up; one prompt always stays for training.

    Returns:
        A mask over the rows.

    Example:
        >>> held_out_prompts(np.array([7, 3, 7, 9]), 0.3).tolist()
        [False, True, False, False]
    """
    ranked = np.unique(prompt_keys)
    number = min(int(np.ceil(fraction * len(ranked) - 1e-9)), len(ranked) - 1)
    return prompt_keys < ranked[number] if number > 0 else np.zeros(len(prompt_keys), dtype=bool)


def _flags_of(row: FeedbackRow, sample: TokenizedSample | None) -> int:
    flags = {True: _UP, False: _DOWN, None: 0}[row.thumbs_up]
    if sample is None:
        return flags | _DROPPED
    return flags | sample.prompt_cut * _PROMPT_CUT | sample.completion_cut * _COMPLETION_CUT


def _first_bytes(digest: Any) -> int:
    return int.from_bytes(digest.digest()[:8], "big")
