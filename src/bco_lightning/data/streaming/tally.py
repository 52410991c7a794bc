"""Counts that loader workers leave for the process that started them."""

from __future__ import annotations

import json
import weakref
import zlib
from dataclasses import asdict
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from bco_lightning.data.row_counts import Counted
from bco_lightning.data.scratch_file import ScratchFile

_SLOTS, _SLOT_BYTES, _HEAD_BYTES = 129, 2**13, 8


class Tally:
    """Rows counted by reason, in a file that a process and its loader workers map; each writes to a slot of its own.

    Example:
        >>> tally = Tally()
        >>> tally.add("too long", "log.jsonl:7")
        >>> tally.counts()
        {'too long': Counted(count=1, places=['log.jsonl:7'])}
    """

    def __init__(self) -> None:
        file = ScratchFile(suffix=".tally")
        file.allocate(_SLOTS * _SLOT_BYTES)
        self._path = file.path
        weakref.finalize(self, file.remove)
        self._map()

    def add(self, reason: str, place: str) -> None:
        """Counts a row in the slot of this worker, which goes on with what an earlier worker of its number left."""
        info = get_worker_info()
        slot = 0 if info is None else 1 + info.id % (_SLOTS - 1)
        counts = self._read(slot)
        counts.setdefault(reason, Counted()).add(place)
        text = json.dumps({reason: asdict(counted) for reason, counted in counts.items()}).encode()
        if len(text) > _SLOT_BYTES - _HEAD_BYTES:
            text = json.dumps({reason: {"count": counted.count} for reason, counted in counts.items()}).encode()
        self._slots[slot, _HEAD_BYTES : _HEAD_BYTES + len(text)] = np.frombuffer(text, np.uint8)
        self._slots[slot, :_HEAD_BYTES].view(np.uint32)[:] = len(text), zlib.crc32(text)

    def counts(self) -> dict[str, Counted]:
        """What all of them have counted."""
        total: dict[str, Counted] = {}
        for slot in np.flatnonzero(self._slots[:, :_HEAD_BYTES].any(axis=1)).tolist():
            for reason, counted in self._read(slot).items():
                total.setdefault(reason, Counted()).take(counted.count, counted.places)
        return total

    def _read(self, slot: int) -> dict[str, Counted]:
        for _ in range(1000):  # a worker may be writing just now
            length, checksum = self._slots[slot, :_HEAD_BYTES].view(np.uint32).tolist()
            text = self._slots[slot, _HEAD_BYTES : _HEAD_BYTES + length].tobytes()
            if zlib.crc32(text) == checksum:
                return {reason: Counted(**counted) for reason, counted in json.loads(text or b"{}").items()}
        return {}

    def _map(self) -> None:
        self._slots = np.memmap(self._path, np.uint8, "r+", shape=(_SLOTS, _SLOT_BYTES))

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._path = state["_path"]
        self._map()
