"""Rows of sources: what is kept of each in memory while they are read, and the table of their tokens on disk."""

from __future__ import annotations

import hashlib
import json
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bco_lightning.batch import FeedbackRow, LeftOut, TokenizedSample
from bco_lightning.data.counts import Counted, FeedbackSummary, RowCounts
from bco_lightning.data.images import IMAGES, file_of
from bco_lightning.data.options import Conflicts

Array = np.ndarray[Any, Any]
CONFLICTING = "conflicting thumbs on one answer (data.conflicts)"

_UP, _DOWN = 1, 2
_THUMBS = {True: _UP, False: _DOWN, None: 0}
_CUTS = ("prompts cut", "completions cut", "messages after the rated turn left out")
_NUMBERS = ("prompt", "<i8"), ("answer", "<i8"), ("source", "<u2"), ("reason", "u1"), ("thumb", "u1")
_KEPT = np.dtype([*_NUMBERS, *((cut, "?") for cut in _CUTS)])
_PACK = struct.Struct("<qqHBB???").pack  # the same
# Opening a file touches each of its batches, and every touch makes some pages of it resident.
_BATCH_BYTES = 2**21
_NO_TOKENS = TokenizedSample([], [])
# An encoder for each call would take half of the time.
_sorted_json = json.JSONEncoder(ensure_ascii=False, default=str, sort_keys=True).encode


class RowTable:
    """Tokenized rows on disk in the order of their sources, then divided into data sets with a file each.

    They pass the disk twice, since which prompts are held out is known only when all of them are. In memory is kept of
    each row what that takes: 23 bytes.
    """

    schema = pa.schema(
        {
            "row_id": pa.int64(),
            "input_ids": pa.list_(pa.int32()),
            "completion_mask": pa.list_(pa.bool_()),
            "thumbs_up": pa.bool_(),
            "prompt": pa.string(),
            "place": pa.string(),
            "source": pa.int16(),
            "prompt_key": pa.int64(),
            "prompt_length": pa.int32(),
            "completion_length": pa.int32(),
            "score": pa.float64(),
            "images": pa.list_(pa.binary()),
            "prompt_images": pa.int32(),
        }
    )

    def __init__(self, folder: Path, sources: Sequence[str]) -> None:
        self._sources, self._reasons, self._kept = list(sources), {"": 0}, bytearray()
        self._folder, self._draft = folder, folder / f".rows-{secrets.token_hex(4)}"
        # It is written once and read once, so the disk's time counts for more than that of packing.
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writer = pa.ipc.new_stream(str(self._draft), self.schema, options=options)
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        self._columns = [name for name in self.schema.names if "images" not in name]  # tables of text have none
        self._image_files: dict[str, int] = {}  # by path, when each was written
        self.told: dict[str, Any] = {"images": self._image_files}  # to be kept with the rows
        self.others = RowCounts("others")  # what became of rows that have no place here

    def __len__(self) -> int:
        return len(self._kept) // _KEPT.itemsize

    @property
    def all(self) -> Array:
        """A choice of all rows."""
        return np.ones(len(self), bool)

    @property
    def rows(self) -> Array:
        """Of each row the keys of its prompt and of all it says, its source, why it is left out, thumb, and cuts."""
        return np.frombuffer(bytes(self._kept), _KEPT)

    def note(self, row: FeedbackRow, source: int, outcome: TokenizedSample | LeftOut = _NO_TOKENS) -> tuple[int, str]:
        """Takes note of a row; gives its prompt's key, and the prompt's messages as JSON."""
        said, prompt = _prompt_digest(row), _sorted_json(row.prompt)
        key = _first_bytes(said)
        said.update(f"{prompt}{_sorted_json([row.completion, dict(row.template_options)])}".encode())
        sample, reason = (_NO_TOKENS, outcome.reason) if isinstance(outcome, LeftOut) else (outcome, "")
        cuts = sample.prompt_cut, sample.completion_cut, bool(row.num_trailing)
        self._kept += _PACK(key, _first_bytes(said), source, self._number_of(reason), _THUMBS[row.thumbs_up], *cuts)
        return key, prompt

    def leave_out_conflicts(self, rule: Conflicts) -> None:
        """Leaves out rows whose answer has thumbs of both kinds, as far as the rule says so."""
        rows = np.array(self.rows)
        used = np.flatnonzero(rows["reason"] == 0)
        losing = used[rows_in_conflict(rows["answer"][used], rows["thumb"][used] == _UP, rule)]
        if len(losing):
            rows["reason"][losing] = self._number_of(CONFLICTING)
            self._kept = bytearray(rows.tobytes())

    def classes(self) -> list[Array]:
        """Which rows can be used and are thumbs-up, and which thumbs-down."""
        rows = self.rows
        return [(rows["reason"] == 0) & (rows["thumb"] == thumb) for thumb in (_UP, _DOWN)]

    def summary(self) -> FeedbackSummary:
        """What the rows look like as a whole."""
        rows = self.rows
        sources = np.bincount(rows["source"], minlength=len(self._sources)).tolist()
        up, down = (np.unique(rows["answer"][rows["thumb"] == thumb]) for thumb in (_UP, _DOWN))
        return FeedbackSummary(
            rows=len(rows),
            duplicates=len(rows) - len(up) - len(down),
            contradictions=len(np.intersect1d(up, down, assume_unique=True)),
            sources=dict(zip(self._sources, sources, strict=True)),
        )

    def digest(self, chosen: Array) -> str:
        """SHA-256 over a key of what was said (not of the tokens made of it) and the thumb of each of some rows."""
        rows = self.rows[chosen]
        return hashlib.sha256(rows["answer"].tobytes() + rows["thumb"].tobytes()).hexdigest()

    def counts(self, name: str, chosen: Array) -> RowCounts:
        """What became of some rows; the places of those left out are still to be added."""
        rows, reasons = self.rows[chosen], list(self._reasons)
        used = rows[rows["reason"] == 0]
        up, down = (
            np.bincount(used["source"][used["thumb"] == thumb], minlength=len(self._sources)).tolist()
            for thumb in (_UP, _DOWN)
        )
        return RowCounts(
            name,
            read=len(rows),
            up=sum(up),
            down=sum(down),
            left_out={reasons[number]: Counted() for number in np.unique(rows["reason"]) if number},
            cut={what: int(used[what].sum()) for what in _CUTS},
            by_source={source: (up[n], down[n]) for n, source in enumerate(self._sources)},
        )

    def _number_of(self, reason: str) -> int:
        return self._reasons.setdefault(reason, len(self._reasons))

    def append(self, row: FeedbackRow, source: int, outcome: Any) -> None:
        """Adds a row of the source with that number, with its :class:`TokenizedSample`, or :class:`LeftOut`."""
        sample = outcome if isinstance(outcome, TokenizedSample) else _NO_TOKENS
        key, prompt = self.note(row, source, outcome)
        if sample.images:
            self._columns = self.schema.names
            paths = filter(None, (file_of(image)[1] for image in sample.images))
            self._image_files |= {path: Path(path).stat().st_mtime_ns for path in paths}
        # Lists of numbers would take many times the memory until they are written.
        ids, mask = np.array(sample.input_ids, np.int32), np.frombuffer(bytes(sample.completion_mask), bool)
        self._add(
            ids.nbytes + mask.nbytes + len(prompt) + sum(map(len, sample.images)),
            input_ids=ids, completion_mask=mask, thumbs_up=row.thumbs_up, prompt=prompt, place=row.place, source=source,
            prompt_key=key, prompt_length=sample.prompt_length, completion_length=sample.completion_length,
            score=row.score, images=sample.images, prompt_images=sample.prompt_images,
        )  # fmt: skip

    def divide(self, chosen: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
        """Leaves a file for each named choice of rows, a mask over them, with those that are used.

        Returns:
            Plain values of each: counts, to the first of which those of ``others`` are added, a digest of what its rows
            say, and what is ``told``.
        """
        self._flush()
        self._writer.close()
        counts = {name: self.counts(name, rows) for name, rows in chosen.items()}
        schema = pa.schema([self.schema.field(name) for name in self._columns])
        files = {name: pa.ipc.new_stream(str(self._folder / f"{name}.arrow"), schema) for name in chosen}
        start, left_out, names, numbers = 0, self.rows["reason"], list(self._reasons), dict.fromkeys(chosen, 0)
        # Read, not memory-mapped: what passes through should not stay in resident memory.
        with pa.OSFile(str(self._draft)) as draft:
            for batch in pa.ipc.open_stream(draft):
                reasons, mine = left_out[start : start + len(batch)], slice(start, start + len(batch))
                for name, rows in chosen.items():
                    used = batch.filter(pa.array(rows[mine] & (reasons == 0))).select(self._columns)
                    row_ids = pa.array(np.arange(numbers[name], numbers[name] + len(used)))
                    files[name].write_batch(used.set_column(0, schema.field(0), row_ids))
                    numbers[name] += len(used)
                    for row in np.flatnonzero(rows[mine] & (reasons > 0)).tolist():
                        counts[name].left_out[names[reasons[row]]].take(1, [self._place(batch, row)])
                start = mine.stop
        for file in files.values():
            file.close()
        self._draft.unlink()
        pa.default_memory_pool().release_unused()
        next(iter(counts.values())).add(self.others)
        return {
            name: {"counts": asdict(counts[name]), "digest": self.digest(rows), **self.told}
            for name, rows in chosen.items()
        }

    def _place(self, batch: pa.RecordBatch, row: int) -> str:
        return str(batch.column("place")[row])

    def _add(self, num_bytes: int, **values: Any) -> None:
        self._pending.append(values)
        self._pending_bytes += num_bytes
        if self._pending_bytes >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._pending, self.schema))
        self._pending, self._pending_bytes = [], 0


def prompt_key(row: FeedbackRow) -> int:
    """What the prompt of a row is known by: eight bytes of a digest of what is said in it, and of its tools."""
    return _first_bytes(_prompt_digest(row))


def held_out_prompts(prompt_keys: Array, fraction: float, seed: int = 0, classes: Sequence[Array] = ()) -> Array:
    """Which rows have one of the prompts to hold out: a share of the distinct ones, rounded up, but never all.

    Whether a prompt is held out hangs on its key and the seed, and hardly on what other prompts there are. Of each of
    ``classes``, masks of rows, some stay to train on and some are held out, where they have more than one prompt.

    Example:
        >>> held_out_prompts(np.array([7, 3, 7, 9]), 0.3).tolist()
        [True, False, True, False]
    """
    scattered: Array = _scattered(prompt_keys, seed)
    ranked = np.unique(scattered)
    number = min(int(np.ceil(fraction * len(ranked) - 1e-9)), len(ranked) - 1)
    held_out: Array = scattered < ranked[number] if number > 0 else np.zeros(len(prompt_keys), dtype=bool)
    balanced, prompts = held_out, [np.unique(scattered[rows]) for rows in classes if number > 0]
    for which, side in ((-1, False), (0, True)):  # the last comes back if all are held out, the first goes if none is
        for rows, own in zip(classes, prompts, strict=False):
            if len(own) > side and (balanced[rows] != side).all():
                balanced = np.where(scattered == own[which], side, balanced)
    is_trained_on = all((~balanced[rows]).any() for rows in classes)
    return balanced if is_trained_on else held_out


def _scattered(keys: Array, seed: int) -> Array:
    """Another number for each key, by the finalizer of SplitMix64, which no two keys share."""
    numbers = keys.astype(np.int64).view(np.uint64) ^ np.random.SeedSequence(seed).generate_state(1, np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    scattered: Array = numbers ^ (numbers >> np.uint64(31))
    return scattered


def rows_in_conflict(answer_keys: Array, thumbs_up: Array, rule: Conflicts) -> Array:
    """Which rows a rule leaves out because their answer has thumbs of the other kind too.

    ``drop`` leaves out all rows of such an answer; ``majority`` those of its rarer thumb, or all where both are as
    frequent; ``last`` those whose thumb is not that of its last row.
    """
    if rule == "keep" or not len(answer_keys):
        return np.zeros(len(answer_keys), dtype=bool)
    _, answers = np.unique(answer_keys, return_inverse=True)
    num_up, num_down = np.bincount(answers, thumbs_up), np.bincount(answers, ~thumbs_up)
    conflicting = (np.minimum(num_up, num_down) > 0)[answers]
    losing = np.ones(len(answer_keys), dtype=bool)
    if rule == "majority":
        losing = np.where(thumbs_up, num_up[answers] <= num_down[answers], num_down[answers] <= num_up[answers])
    elif rule == "last":
        last = np.zeros(len(num_up), dtype=np.int64)
        np.maximum.at(last, answers, np.arange(len(answers)))
        losing = thumbs_up != thumbs_up[last[answers]]
    return np.logical_and(conflicting, losing)


def _prompt_digest(row: FeedbackRow) -> Any:
    said = [
        (message["role"], message.get("content", ""), message.get("tool_calls"), *message.get(IMAGES, ()))
        for message in row.prompt
    ]
    return hashlib.sha256(_sorted_json([said, row.tools]).encode())


def _first_bytes(digest: Any) -> int:
    return int.from_bytes(digest.digest()[:8], "big", signed=True)
