"""Tokenized rows on disk, written one after the other and then divided into data sets, 20 bytes a row in memory."""

from __future__ import annotations

import hashlib
import json
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from bco_lightning.batch import FeedbackRow, LeftOut, TokenizedSample
from bco_lightning.data.conflicts import CONFLICTING, Conflicts, rows_in_conflict
from bco_lightning.data.row_counts import Counted, RowCounts
from bco_lightning.data.scratch_file import ScratchFile
from bco_lightning.errors import FaultError

_UP, _DOWN, _PROMPT_CUT, _COMPLETION_CUT, _TRAILING_CUT = (1 << bit for bit in range(5))
_CUTS = {
    "prompts cut": _PROMPT_CUT,
    "completions cut": _COMPLETION_CUT,
    "messages after the rated turn left out": _TRAILING_CUT,
}
_BATCH_ROWS, _BATCH_TOKENS = 128, 2**18
# Opening a file touches each of its batches, and every touch makes some pages of it resident.
_FINAL_BATCH_BYTES = 2**23
_COLUMNS = {
    "input_ids": pa.list_(pa.int32()),
    "completion_mask": pa.list_(pa.bool_()),
    "thumbs_up": pa.bool_(),
    "prompt": pa.string(),
    "place": pa.string(),
    "source": pa.int16(),
    "prompt_key": pa.int64(),
    "prompt_length": pa.int32(),
    "completion_length": pa.int32(),
}
# The digest is of what was said, and not of the tokens that were made of it.
_LISTS = ("input_ids", "completion_mask")
_DRAFT = pa.schema({**_COLUMNS, "digest": pa.binary(32)})
_FINAL = pa.schema({"row_id": pa.int64(), **_COLUMNS})
_NO_TOKENS = TokenizedSample([], [])
# An encoder for each call would take half of the time.
_json = json.JSONEncoder(ensure_ascii=False, default=str, sort_keys=True).encode


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
        return cls(RowCounts.from_values(told["counts"]), dataset, told["digest"])


class RowTable:
    """Rows in the order of their sources; a context manager that leaves nothing but the data sets made from it.

    Args:
        sources: Names of the sources.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self._file = ScratchFile()
        self._sink = pa.OSFile(self._file.path, "wb")
        # It is written once and read once, so the disk's time counts for more than that of packing.
        self._writer = pa.ipc.new_stream(self._sink, _DRAFT, options=pa.ipc.IpcWriteOptions(compression="lz4"))
        self._pending: dict[str, list[Any]] = {name: [] for name in _DRAFT.names}
        self._pending_tokens = 0
        self._prompt_keys, self._answer_keys = array("q"), array("q")
        self._flags, self._reasons, self._source_numbers = array("B"), array("B"), array("H")
        self._sources, self._reason_names = list(sources), [""]

    def __enter__(self) -> RowTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._sink.close()
        self._file.remove()

    def __len__(self) -> int:
        return len(self._flags)

    @property
    def prompt_keys(self) -> np.ndarray[Any, Any]:
        """A number for each row's prompt: :func:`prompt_key`."""
        return np.frombuffer(self._prompt_keys, dtype=np.int64)

    @property
    def answer_keys(self) -> np.ndarray[Any, Any]:
        """A number for each row's prompt and completion."""
        return np.frombuffer(self._answer_keys, dtype=np.int64)

    @property
    def thumbs_up(self) -> np.ndarray[Any, Any]:
        """Whether each row has thumbs-up."""
        return self._has(_UP)

    def append(self, row: FeedbackRow, outcome: TokenizedSample | LeftOut, source: int = 0) -> None:
        """Adds a row of the source with that number, with its tokens, or why it is left out."""
        prompt = _json(row.prompt)
        said = _prompt_digest(prompt, row)
        key = _first_bytes(said)
        said.update(f"\n{_json(row.completion)}".encode())
        if row.template_options:
            said.update(_json(dict(row.template_options)).encode())
        self._prompt_keys.append(key)
        self._answer_keys.append(_first_bytes(said))
        said.update(str(row.thumbs_up).encode())
        sample = outcome if isinstance(outcome, TokenizedSample) else _NO_TOKENS
        self._flags.append(_flags_of(row, sample))
        self._reasons.append(self._reason_number(outcome.reason) if isinstance(outcome, LeftOut) else 0)
        self._source_numbers.append(source)
        pending = self._pending
        pending["input_ids"].append(sample.input_ids)
        pending["completion_mask"].append(sample.completion_mask)
        pending["thumbs_up"].append(row.thumbs_up)
        pending["prompt"].append(prompt)
        pending["place"].append(row.place)
        pending["source"].append(source)
        pending["prompt_key"].append(key)
        pending["prompt_length"].append(sample.prompt_length)
        pending["completion_length"].append(sample.completion_length)
        pending["digest"].append(said.digest())
        self._pending_tokens += len(sample.input_ids)
        if len(pending["place"]) >= _BATCH_ROWS or self._pending_tokens >= _BATCH_TOKENS:
            self._flush()

    def leave_out_conflicts(self, rule: Conflicts) -> None:
        """Leaves out rows whose answer has thumbs of both kinds, as far as the rule says so."""
        reasons = np.frombuffer(self._reasons, dtype=np.uint8)
        used = np.flatnonzero(reasons == 0)
        losing = used[rows_in_conflict(self.answer_keys[used], self.thumbs_up[used], rule)]
        number = self._reason_number(CONFLICTING) if len(losing) else 0
        del reasons
        for row in losing:
            self._reasons[row] = number

    def divide(self, chosen: Mapping[str, np.ndarray[Any, Any]], folder: Path | None = None) -> dict[str, RowSet]:
        """Makes a data set of each named choice of rows; the table is complete then.

        Args:
            chosen: A mask over the rows for each name.
            folder: Where to leave their files, each under its name; without, they go when their data set goes.
        """
        self._flush()
        self._writer.close()
        self._sink.close()
        makers = {name: _RowSetMaker(self._counts(name, rows), folder) for name, rows in chosen.items()}
        start = 0
        for batch in self._batches():
            reasons = self._reasons[start : start + len(batch)]
            for name, maker in makers.items():
                maker.take(batch, chosen[name][start : start + len(batch)], np.asarray(reasons), self._reason_names)
            start += len(batch)
        row_sets = {name: maker.finish() for name, maker in makers.items()}
        pa.default_memory_pool().release_unused()
        return row_sets

    def _batches(self) -> Iterator[pa.RecordBatch]:
        # Read, not memory-mapped: what passes through should not stay in resident memory.
        with pa.OSFile(self._file.path) as file:
            yield from pa.ipc.open_stream(file)

    def _flush(self) -> None:
        if self._pending["place"]:
            # Arrow takes ten times longer to look at each number by itself.
            lists = {name: _lists(self._pending[name], _DRAFT.field(name).type) for name in _LISTS}
            self._writer.write_batch(pa.RecordBatch.from_pydict({**self._pending, **lists}, schema=_DRAFT))
        for values in self._pending.values():
            values.clear()
        self._pending_tokens = 0

    def _reason_number(self, reason: str) -> int:
        if reason not in self._reason_names:
            self._reason_names.append(reason)
        return self._reason_names.index(reason)

    def _counts(self, name: str, chosen: np.ndarray[Any, Any]) -> RowCounts:
        reasons = np.frombuffer(self._reasons, dtype=np.uint8)
        sources = np.frombuffer(self._source_numbers, dtype=np.uint16)
        used = chosen & (reasons == 0)
        up, down = (np.bincount(sources[used & self._has(flag)], minlength=len(self._sources)) for flag in (_UP, _DOWN))
        found = {self._reason_names[number]: Counted() for number in np.unique(reasons[chosen]) if number}
        return RowCounts(
            name,
            read=int(chosen.sum()),
            up=int(up.sum()),
            down=int(down.sum()),
            left_out=found,
            cut={what: int((used & self._has(flag)).sum()) for what, flag in _CUTS.items()},
            by_source={source: (int(up[n]), int(down[n])) for n, source in enumerate(self._sources)},
        )

    def _has(self, flag: int) -> np.ndarray[Any, Any]:
        return (np.frombuffer(self._flags, dtype=np.uint8) & flag) > 0


@dataclass
class _RowSetMaker:
    """Writes the used rows of a choice to a file of their own, batch by batch."""

    counts: RowCounts
    folder: Path | None
    _digest: Any = field(default_factory=hashlib.sha256)
    _written: int = 0
    _pending: list[pa.RecordBatch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file = None if self.folder else ScratchFile()
        self._path = self._file.path if self._file else str(self.folder / f"{self.counts.name}.arrow")  # type: ignore[operator]
        self._writer = pa.ipc.new_stream(self._path, _FINAL)

    def take(
        self,
        batch: pa.RecordBatch,
        chosen: np.ndarray[Any, Any],
        reasons: np.ndarray[Any, Any],
        reason_names: Sequence[str],
    ) -> None:
        for digest in batch.column("digest").filter(pa.array(chosen)):
            self._digest.update(digest.as_buffer())
        for row in np.flatnonzero(chosen & (reasons > 0)):
            self.counts.left_out[reason_names[reasons[row]]].add(batch.column("place")[int(row)].as_py())
        used = batch.filter(pa.array(chosen & (reasons == 0)))
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
        if self._written:
            row_set.dataset = _mapped(self._file) if self._file else Dataset.from_file(self._path)
        elif self._file:
            self._file.remove()
        return row_set


def _mapped(file: ScratchFile) -> Dataset:
    """The rows of a file, which is kept as long as they are."""
    dataset = Dataset.from_file(file.path)
    weakref.finalize(dataset, file.remove)
    return dataset


def prompt_key(row: FeedbackRow) -> int:
    """What the prompt of a row is known by: eight bytes of a digest of its messages and tools, as a signed number.

    Rows are held out, compared, grouped, weighted and counted by it.
    """
    return _first_bytes(_prompt_digest(_json(row.prompt), row))


def held_out_prompts(prompt_keys: np.ndarray[Any, Any], fraction: float, seed: int = 0) -> np.ndarray[Any, Any]:
    """Which rows have one of the prompts to hold out.

    Whether a prompt is held out hangs on its key, and hardly on what other prompts there are.

    Args:
        prompt_keys: :func:`prompt_key` of each row.
        fraction: Share of the distinct prompts to hold out, rounded up; one prompt always stays for training.
        seed: Of the choice.

    Returns:
        A mask over the rows.

    Example:
        >>> held_out_prompts(np.array([7, 3, 7, 9]), 0.3).tolist()
        [True, False, True, False]
    """
    scattered = _scattered(prompt_keys, seed)
    ranked = np.unique(scattered)
    number = min(int(np.ceil(fraction * len(ranked) - 1e-9)), len(ranked) - 1)
    return scattered < ranked[number] if number > 0 else np.zeros(len(prompt_keys), dtype=bool)


def _scattered(keys: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    """Another number for each key, by the finalizer of SplitMix64, which no two keys share."""
    numbers = keys.astype(np.int64).view(np.uint64) ^ np.random.SeedSequence(seed).generate_state(1, np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(31))


def _flags_of(row: FeedbackRow, sample: TokenizedSample) -> int:
    flags = {True: _UP, False: _DOWN, None: 0}[row.thumbs_up] | bool(row.num_trailing) * _TRAILING_CUT
    return flags | sample.prompt_cut * _PROMPT_CUT | sample.completion_cut * _COMPLETION_CUT


def _lists(values: Sequence[Sequence[Any]], kind: pa.ListType) -> pa.ListArray:
    lengths = np.fromiter(map(len, values), dtype=np.int32, count=len(values))
    offsets = np.concatenate([np.zeros(1, dtype=np.int32), np.cumsum(lengths, dtype=np.int32)])
    numbers = np.fromiter(chain.from_iterable(values), dtype=kind.value_type.to_pandas_dtype(), count=offsets[-1])
    return pa.ListArray.from_arrays(offsets, pa.array(numbers), type=kind)


def _prompt_digest(prompt: str, row: FeedbackRow) -> Any:
    return hashlib.sha256((f"{prompt}\n{_json(row.tools)}" if row.tools else prompt).encode())


def _first_bytes(digest: Any) -> int:
    return int.from_bytes(digest.digest()[:8], "big", signed=True)
