"""Reference log-probabilities of whole data sets: looked up by what is in a row, computed once, kept on disk."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from bco_lightning.batch import FeedbackBatch, ScoredRows
from bco_lightning.data.collate import collate
from bco_lightning.identity import digest_of_values, versions
from bco_lightning.models.adapters import REFERENCE_ADAPTER
from bco_lightning.models.layout import layout_of
from bco_lightning.parallel.collectives import gather_over_ranks, max_over_ranks
from bco_lightning.parallel.sharding import final_dtype
from bco_lightning.reference_store import KEY_BYTES, RECORD, ReferenceStore

LAYOUT_VERSION = 1  # to be raised when rows come to be computed in another way, so that values round differently
_BATCH_TOKENS = 4096
_SECONDS_BETWEEN_WRITES = 30.0
_ROWS_AT_A_TIME = 1000
_NO_PART_OF_A_MODEL = ("_name_or_path", "transformers_version", "dtype")  # the last one has its own place
_COLUMNS = ["row_id", "input_ids", "completion_mask", "thumbs_up"]


def key_of_log_probs(model: Any, trainer: Any, **choices: Any) -> str:
    """A digest of all that a reference log-prob depends on, besides its row and what else is in its micro-batch.

    Args:
        model: The reference's own model, or the policy, whose code and layout it shares.
        trainer: The Lightning trainer.
        choices: What else its numbers depend on, such as a digest of the reference's weights.
    """
    device, config = trainer.strategy.root_device, model.config.to_dict()
    names = {"cuda": torch.cuda.get_device_name, "cpu": lambda _: str(torch.cpu.get_capabilities())}
    adapters = getattr(model, "peft_config", {})
    came_in = adapters[REFERENCE_ADAPTER].to_dict() if REFERENCE_ADAPTER in adapters else {}
    return digest_of_values(
        {
            **choices,
            "config": {name: value for name, value in config.items() if name not in _NO_PART_OF_A_MODEL},
            # PEFT keeps names in sets, whose order is another one in every process.
            "adapter": {name: sorted(value) if isinstance(value, set) else value for name, value in came_in.items()},
            "dtype": str(final_dtype(next(model.parameters()))),
            "precision": trainer.precision,
            "device": device.type,
            "device_name": names[device.type](device) if device.type in names else "",
            "layout": layout_of(model),
            "layout_version": LAYOUT_VERSION,
            "attention": model.config.get_text_config()._attn_implementation,
            "torch": torch.__version__,
            "versions": {name: versions()[name] for name in ("bco-lightning", "transformers", "peft")},
        }
    )


def keys_and_lengths(dataset: Dataset) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The key of each row, the first 128 bits of SHA-256 over its tokens and which carry loss, and its length.

    Args:
        dataset: Rows with ``input_ids`` and ``completion_mask``.

    Returns:
        Keys of 16 bytes and lengths in tokens, each of shape ``(rows,)``.
    """
    keys, lengths = bytearray(), [np.empty(0, np.int32)]
    for table in dataset.select_columns(_COLUMNS[1:3]).with_format("arrow").iter(_ROWS_AT_A_TIME):
        ids, masks = (table.column(name).combine_chunks() for name in _COLUMNS[1:3])
        tokens = memoryview(ids.values.to_numpy().astype("<i4", copy=False).tobytes())
        scored = memoryview(masks.values.to_numpy(zero_copy_only=False).tobytes())
        starts, mask_starts = ids.offsets.to_pylist(), masks.offsets.to_pylist()
        for row in range(len(ids)):
            digest = hashlib.sha256(tokens[4 * starts[row] : 4 * starts[row + 1]])
            digest.update(scored[mask_starts[row] : mask_starts[row + 1]])
            keys += digest.digest()[:KEY_BYTES]
        lengths.append(np.diff(starts).astype(np.int32))
    return np.frombuffer(bytes(keys), dtype=RECORD["key"]), np.concatenate(lengths)


def _ids_and_values(scored: Sequence[ScoredRows]) -> Tensor:
    pairs = [torch.empty(0, 2, dtype=torch.float64)]
    for rows in scored:
        ids_B, values_B = rows.row_ids_B.cpu().double(), rows.reference_log_probs_B.cpu().double()
        pairs.append(torch.stack([ids_B, values_B], dim=1))
    return torch.cat(pairs)


class ReferenceCache:
    """What is known of the reference's log-probabilities on some data sets; the same in every process.

    A row is known by its content. Its first value stands, so every later pass over it, and every row like it, uses one
    and the same number.

    Args:
        store: Where values are kept.
        datasets: The data sets, by name.
        trainer: The Lightning trainer.
    """

    def __init__(self, store: ReferenceStore, datasets: Mapping[str, Dataset], trainer: Any) -> None:
        self.store, self.datasets, self._trainer = store, dict(datasets), trainer
        found = [keys_and_lengths(dataset) for dataset in self.datasets.values()]
        self._keys, slots = np.unique(np.concatenate([keys for keys, _ in found]), return_inverse=True)
        borders = np.cumsum([len(keys) for keys, _ in found])[:-1]
        self._slots = dict(zip(self.datasets, np.split(slots, borders), strict=True))
        self._lengths = {name: lengths for name, (_, lengths) in zip(self.datasets, found, strict=True)}
        self._digests = {
            name: hashlib.sha256(keys.tobytes()).hexdigest() for name, (keys, _) in zip(datasets, found, strict=True)
        }
        self._values = np.full(len(self._keys), np.nan, dtype=np.float32)
        self._unsaved = np.zeros(len(self._keys), dtype=bool)
        self._complete: set[str] = set()
        self._take(store.read())
        self._agree()

    @property
    def num_rows(self) -> int:
        """Distinct rows of all data sets."""
        return len(self._keys)

    @property
    def num_unknown(self) -> int:
        """Distinct rows whose value is not known yet."""
        return int(np.isnan(self._values).sum())

    def is_complete(self, name: str) -> bool:
        """Whether the values of all rows of a data set are known."""
        if name not in self._complete and not np.isnan(self._values[self._slots[name]]).any():
            self._complete.add(name)
        return name in self._complete

    def lookup(self, name: str, row_ids_B: Tensor) -> Tensor | None:
        """Values of some rows.

        Args:
            name: Name of their data set.
            row_ids_B: Their positions in it; int64, on the CPU.

        Returns:
            Shape ``(B,)``, float32, in nats, on the CPU; nothing if one of them is not known.
        """
        if name not in self._slots:
            return None
        values_B = torch.from_numpy(self._values[self._slots[name][row_ids_B.numpy()]])
        return None if bool(values_B.isnan().any()) else values_B

    def record(self, name: str, scored: Sequence[ScoredRows]) -> None:
        """Takes over what all processes have computed of a data set; every process has to call it.

        Args:
            name: Name of the data set.
            scored: Micro-batches of this process.
        """
        if name not in self._slots or self.is_complete(name):
            return
        row_ids, values = torch.cat(gather_over_ranks(_ids_and_values(scored).cpu(), self._trainer)).numpy().T
        self._put(self._slots[name][row_ids.astype(np.int64)], values)
        if not self._trainer.is_global_zero:
            self._unsaved[:] = False  # the first process writes for all

    def keep(self, name: str, scored: Sequence[ScoredRows]) -> None:
        """Like :meth:`record`, of this process alone, for ends that not every process comes to."""
        if name in self._slots:
            row_ids, values = _ids_and_values(scored).numpy().T
            self._put(self._slots[name][row_ids.astype(np.int64)], values)

    def write(self) -> None:
        """Puts on disk what is not there yet."""
        records = np.empty(int(self._unsaved.sum()), RECORD)
        records["key"], records["value"] = self._keys[self._unsaved], self._values[self._unsaved]
        self.store.append(records)
        self._unsaved[:] = False

    def compute(
        self, log_probs: Callable[[FeedbackBatch], Tensor], *, by_length: bool, share_prompts: bool = True
    ) -> None:
        """Computes what is not known, each process a share, and writes it now and then; all processes know it after.

        Every process runs as many passes, as sharded models need it: one with fewer micro-batches repeats some.

        Args:
            log_probs: Scores a micro-batch, given on the CPU.
            by_length: Put rows of like length together, for models that pad.
            share_prompts: Compute a prompt once for neighbouring rows that have it.
        """
        micro_batches = [
            (name, rows) for name in self.datasets for rows in self._micro_batches(name, by_length=by_length)
        ]
        trainer, written_at = self._trainer, time.monotonic()
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        with tqdm(total=self.num_unknown, desc="reference log-probs", unit="row", disable=not shown) as bar:
            for first in range(0, len(micro_batches), trainer.world_size):
                name, rows = micro_batches[(first + trainer.global_rank) % len(micro_batches)]
                values = log_probs(collate(self._samples(name, rows), share_prompts=share_prompts))
                self._put(self._slots[name][rows], values.cpu().numpy())
                bar.update(sum(len(rows) for _, rows in micro_batches[first : first + trainer.world_size]))
                if time.monotonic() - written_at >= _SECONDS_BETWEEN_WRITES:
                    self.write()
                    written_at = time.monotonic()
        self.write()
        self._agree()

    def state_dict(self) -> dict[str, Any]:
        """Values of each data set in the order of its rows, with what tells whether they still fit."""
        return {
            "key": self.store.key,
            "rows": dict(self._digests),
            "values": {name: torch.from_numpy(self._values[slots]) for name, slots in self._slots.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], *, unknown_too: bool) -> None:
        """Goes on with what a run knew, where reference and rows are the same.

        Args:
            state: What :meth:`state_dict` gave.
            unknown_too: Forget what that run did not know, so that this one computes it as that one would have.
        """
        if state["key"] != self.store.key:
            return
        self._complete.clear()
        for name, slots in self._slots.items():
            if state["rows"].get(name) == self._digests[name]:
                values = state["values"][name].numpy()
                self._values[slots] = values if unknown_too else np.where(np.isnan(values), self._values[slots], values)

    def _take(self, records: np.ndarray[Any, Any]) -> None:
        slots = np.searchsorted(self._keys, records["key"]).clip(max=len(self._keys) - 1)
        ours = self._keys[slots] == records["key"]
        self._put(slots[ours], records["value"][ours])
        self._unsaved[:] = False

    def _put(self, slots: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> None:
        """Sets values that are finite and new; the first of several for a row stands."""
        new = np.isnan(self._values[slots]) & np.isfinite(values)
        slots, first = np.unique(slots[new], return_index=True)
        self._values[slots] = values[new][first]
        self._unsaved[slots] = True

    def _agree(self) -> None:
        """Makes all processes know what one of them knows; their disks may differ."""
        known = torch.from_numpy(np.nan_to_num(self._values, nan=-np.inf))
        agreed = max_over_ranks(known, self._trainer).numpy()
        self._values = np.where(np.isinf(agreed), np.float32(np.nan), agreed)

    def _samples(self, name: str, rows: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
        columns = self.datasets[name].select_columns(_COLUMNS)[rows]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _micro_batches(self, name: str, *, by_length: bool) -> Iterator[np.ndarray[Any, Any]]:
        """Rows to compute, each content once, cut where they would have too many tokens."""
        slots, lengths = self._slots[name], self._lengths[name]
        _, first = np.unique(slots, return_index=True)
        rows = np.sort(first[np.isnan(self._values[slots[first]])])
        if by_length:
            rows = rows[np.argsort(-lengths[rows], kind="stable")]
        start = tokens = 0
        for place, row in enumerate(rows):
            if tokens + lengths[row] > _BATCH_TOKENS and place > start:
                yield rows[start:place]
                start, tokens = place, 0
            tokens += int(lengths[row])
        if len(rows):
            yield rows[start:]
