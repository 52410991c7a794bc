"""Reference log-probs that are known before the first step: a column of the table, kept by content on disk.

On disk are hashes of rows and one number each, nothing that users wrote. Files are never changed and are named after
their own SHA-256: processes and runs can write at the same time without a lock, and a damaged file shows by its name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from tqdm.auto import tqdm

from bco_lightning.batch import FeedbackBatch, ScoredRows
from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.data.collate import COLUMNS, collate, select_known
from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.data.images import ImageInputs, file_of
from bco_lightning.data.order import cut
from bco_lightning.errors import ConfigError, LanguageModelError
from bco_lightning.identity import digest_of_code, digest_of_values, versions
from bco_lightning.models.adapters import REFERENCE_ADAPTER
from bco_lightning.models.build import dtype_of_matrices
from bco_lightning.models.layout import causal_lm_of, layout_of
from bco_lightning.models.refusals import refuse_unknown_token
from bco_lightning.options import ModelOptions
from bco_lightning.parallel.collectives import by_all, max_over_ranks
from bco_lightning.parallel.sharding import final_dtype
from bco_lightning.places import cache_root, is_private
from bco_lightning.reference.model import Reference

_COLUMNS = ["row_id", "input_ids", "completion_mask", "thumbs_up", "images"]
_BATCH_TOKENS = 4096
_SECONDS_BETWEEN_WRITES = 30.0
_DATASETS = {"validate": "validation"}  # by Lightning's names
_NO_PART_OF_A_MODEL = ("_name_or_path", "transformers_version", "dtype")  # the last one has its own place
# What the bits of a log-prob depend on.
_CODE = ("batch.py", "data/collate.py", "models", "reference")
_PACKAGES = ("bco-lightning", "torch", "transformers", "peft")
# What rounding explains of the difference of a token's log-probs, in nats, absolute and relative to them: in bfloat16
# thrice of what was seen where other rows were beside it.
_EXACT, _ROUNDED = (2e-3, 2e-4), (0.2, 0.04)
RECORD = np.dtype([("key", "S16"), ("value", "<f4")])
_MOST_FILES = 16
_ROWS_AT_A_TIME = 1000
_Array = np.ndarray[Any, Any]


def fill_in_log_probs(
    data: FeedbackDataModule | None, stage: str, reference: Reference, options: ModelOptions, trainer: Any
) -> bool:
    """Makes reference log-probs a column of the tables that a stage reads, or leaves them to the steps.

    The weights of a checkpoint are restored after ``setup``: until then the policy is the reference. Gives whether they
    are known; else the reference has a model of its own, if it needs one.
    """
    # Answers to other prompts are known in a step only.
    wanted = "online" if trainer.lightning_module.objective.takes_unrelated else options.reference_log_probs
    tables = data.datasets_of(stage) if data is not None else {}
    for table in tables.values():
        largest = pc.max(pc.list_flatten(table.data.column("input_ids"))).as_py()
        refuse_unknown_token(causal_lm_of(reference.policy), largest or 0)
    known: KnownLogProbs | None = None
    if data is not None and tables and (stage != "fit" or "train" in tables):
        known = None if wanted == "online" else _known(data, tables, stage, reference, options, trainer)
    elif wanted == "before":
        where = "where no FeedbackDataModule is used, or data.streaming is true"
        raise ConfigError("model.reference_log_probs", f"expected auto or online {where}; found before.")
    for name in tables:  # of which an earlier run may have left some
        column = known.column(name) if known is not None else None
        cast(FeedbackDataModule, data).set_column(_DATASETS.get(name, name), "reference_log_prob", column)
    if known is None:
        reference.hold()
    return known is not None


def refuse_other_start(
    data: FeedbackDataModule | None, reference: Reference, score: Callable[[FeedbackBatch], ScoredRows], trainer: Any
) -> None:
    """Stops a run whose reference is another model than its policy, by the rows to train on that tell most.

    They are scored as in a step, by known reference log-probs where there are some: a reference that is loaded as
    another model shows here, and so do values of another one. Rounding of a sum grows as the root of its terms.
    """
    if data is None or not reference.is_policy_that_came_in:
        return
    rows = data.telling_rows("train")
    with torch.no_grad(), reference.where_it_is_used(trainer) as device:
        batch = collate([{name: row[name] for name in COLUMNS if name in row} for row in rows])
        scored = score(batch.to(device))
    is_known = batch.reference_log_probs_B is not None
    exact = dtype_of_matrices(reference.policy) == torch.float32 and "32" in str(trainer.precision)
    exact = exact and torch.get_float32_matmul_precision() == "highest"  # and not TF32
    same_path = device.type == "cpu" and not (is_known or trainer.lightning_module.options.compile)
    absolute, relative = _EXACT if exact or same_path else _ROUNDED
    policy_B, terms_B = scored.policy_log_probs_B, scored.completion_lengths_B.clamp(min=1).sqrt()
    off_B = (policy_B - scored.reference_log_probs_B).abs() - terms_B * absolute - policy_B.abs() * relative / terms_B
    worst = int(off_B.nan_to_num(-torch.inf).argmax())  # NaN is the guard's business

    def refuse() -> None:
        if off_B[worst] > 0:
            found = f"{policy_B[worst]:.3f} and {scored.reference_log_probs_B[worst]:.3f} nats"
            problem = f"expected a policy that is its own reference before step 1, found log-probs of {found}."
            remedy = "Remove reference_log_probs from the cache." if is_known else "Merge the adapter first."
            raise LanguageModelError(rows[worst]["place"], problem, remedy)

    by_all(refuse, trainer)


def _known(
    data: FeedbackDataModule, tables: Any, stage: str, reference: Reference, options: ModelOptions, trainer: Any
) -> KnownLogProbs | None:
    """Log-probs of all rows, found on disk, or computed now if that is worth it."""
    model, shared = reference.own_model or reference.policy, data.options.group_by_prompt
    choices: dict[str, Any] = {"compiled": options.compile, "quantization": options.quantization}
    choices["shared_prompts"] = shared
    if any("images" in table.column_names for table in tables.values()):
        choices["processor"] = ImageInputs(data.tokenizer).digest()
    key = key_of_log_probs(model, trainer, reference=reference.digest, **choices)
    known = KnownLogProbs(tables, cache_root(options.cache_folder) / "reference_log_probs" / key[:32], trainer)
    unknown, passes = known.num_unknown, _passes(stage, trainer)
    saves = passes >= 2 or (passes >= 1 and not reference.is_policy_without_adapter)
    computes = saves or options.reference_log_probs == "before"
    fate = f"{unknown:,} are computed now" if computes else "steps compute them as they need them"
    found = f"{len(known) - unknown:,} of {len(known):,} known from {known.folder}"
    rank_zero_info(f"reference log-probs: {found}, {fate if unknown else 'nothing is left to compute'}")
    if unknown and not computes:
        return None

    def score(batch: FeedbackBatch) -> Tensor:
        with reference.where_it_is_used(trainer) as device:
            return reference.log_probs(batch.to(device))

    # bfloat16 rounds a row with a shared prompt some tenths of a nat away from the same row alone.
    collated = {"share_prompts": shared, "images": ImageInputs(data.tokenizer)}
    known.compute(score, by_length=layout_of(model) == "padded", **collated)
    if known.num_unknown:
        rank_zero_warn(f"{known.num_unknown:,} reference log-probs are not finite.")
    return known


def _passes(stage: str, trainer: Any) -> float:
    """How often a run sees each row, at least."""
    if stage == "fit":
        return float(trainer.lightning_module.num_steps() / trainer.datamodule.steps_per_epoch)
    limit = getattr(trainer, "limit_" + {"validate": "val"}.get(stage, stage) + "_batches")
    return float(isinstance(limit, float) and limit == 1)  # as an integer, 1 is one batch


def key_of_log_probs(model: Any, trainer: Any, **choices: Any) -> str:
    """A digest of all that a reference log-prob depends on, besides its row and what else is in its micro-batch."""
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
            "is_fused": getattr(getattr(causal_lm_of(model), "preparation", None), "fused", None),
            "code": digest_of_code(*_CODE),
            "versions": {name: versions()[name] for name in _PACKAGES},
        }
    )


class KnownLogProbs:
    """Reference log-probs of tables of rows, found by what is in a row; the same in every process.

    The folder keeps values of one reference, computed in one way.
    """

    def __init__(self, tables: Mapping[str, Dataset], folder: Path, trainer: Any) -> None:
        self._tables, self.folder, self._trainer = tables, folder, trainer
        found = {name: keys_and_lengths(table) for name, table in tables.items()}
        self._lengths = {name: lengths for name, (_, lengths) in found.items()}
        self._keys = np.unique(np.concatenate([keys for keys, _ in found.values()]))
        self._slots = {name: np.searchsorted(self._keys, keys) for name, (keys, _) in found.items()}
        self._values = np.full(len(self._keys), np.nan, dtype=np.float32)
        self._unsaved = np.zeros(len(self._keys), dtype=bool)
        records = read_records(folder)
        records = records[np.isin(records["key"], self._keys)]
        self._put(np.searchsorted(self._keys, records["key"]), records["value"])
        self._unsaved[:] = False
        self._agree()

    def __len__(self) -> int:
        """Distinct rows of all tables."""
        return len(self._keys)

    @property
    def num_unknown(self) -> int:
        """Distinct rows whose value is not known."""
        return int(np.isnan(self._values).sum())

    def column(self, name: str) -> _Array:
        """Values of all rows of a table, float32, in nats; NaN where one is not known, or not finite."""
        return self._values[self._slots[name]]

    def compute(self, score: Callable[[FeedbackBatch], Tensor], *, by_length: bool, **collated: Any) -> None:
        """Computes what is not known, each process a share, and writes it now and then; all processes know it after.

        Every process runs as many passes, as sharded models need it: one with fewer micro-batches repeats some.
        """
        batches = [(name, rows) for name in self._tables for rows in self._micro_batches(name, by_length=by_length)]
        trainer, written_at = self._trainer, time.monotonic()
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        with (
            contextlib.ExitStack() as leaving,
            tqdm(total=self.num_unknown, desc="reference log-probs", unit="row", disable=not shown) as bar,
        ):
            leaving.callback(self._write)  # whatever ends the pass, what it has computed is found by the next start
            for first in range(0, len(batches), trainer.world_size):
                name, rows = batches[(first + trainer.global_rank) % len(batches)]
                columns = select_known(self._tables[name], _COLUMNS)[rows]
                samples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
                self._put(self._slots[name][rows], score(collate(samples, **collated)).cpu().numpy())
                bar.update(sum(len(rows) for _, rows in batches[first : first + trainer.world_size]))
                if time.monotonic() - written_at >= _SECONDS_BETWEEN_WRITES:
                    self._write()
                    written_at = time.monotonic()
        self._agree()

    def _write(self) -> None:
        records = np.empty(int(self._unsaved.sum()), RECORD)
        records["key"], records["value"] = self._keys[self._unsaved], self._values[self._unsaved]
        write_records(self.folder, records)
        self._unsaved[:] = False

    def _put(self, slots: _Array, values: _Array) -> None:
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

    def _micro_batches(self, name: str, *, by_length: bool) -> Iterator[_Array]:
        """Rows to compute, each content once, cut where they would have too many tokens."""
        slots, lengths = self._slots[name], self._lengths[name]
        _, first = np.unique(slots, return_index=True)
        rows = np.sort(first[np.isnan(self._values[slots[first]])])
        if by_length:
            rows = rows[np.argsort(-lengths[rows], kind="stable")]
        yield from (rows[part] for part in cut(lengths[rows], _BATCH_TOKENS))


def keys_and_lengths(dataset: Dataset) -> tuple[_Array, _Array]:
    """The key of each row, the first 128 bits of SHA-256 over its tokens and which carry loss, and its length."""
    keys, lengths = bytearray(), [np.empty(0, np.int32)]
    known = select_known(dataset, ("input_ids", "completion_mask", "images")).with_format("arrow")
    for table in known.iter(_ROWS_AT_A_TIME):
        ids, masks = (table.column(name).combine_chunks() for name in ("input_ids", "completion_mask"))
        lengths.append(ids.value_lengths().to_numpy())
        ends = np.cumsum(lengths[-1]).tolist()
        tokens = ids.flatten().to_numpy().astype("<i4", copy=False).tobytes()
        scored = masks.flatten().to_numpy(zero_copy_only=False).tobytes()
        images = table.column("images").to_pylist() if "images" in table.column_names else [()] * len(ends)
        for start, end, seen in zip([0, *ends], ends, images, strict=False):
            told = "".join(file_of(each)[0] or hashlib.sha256(each).hexdigest() for each in seen).encode()
            keys += hashlib.sha256(tokens[4 * start : 4 * end] + scored[start:end] + told).digest()[:16]
    return np.frombuffer(bytes(keys), dtype=RECORD["key"]), np.concatenate(lengths)


def read_records(folder: Path) -> _Array:
    """All values in a folder, in nats; of a row that is there twice, every process finds the same one first.

    A damaged file is passed over with a warning, one that goes meanwhile in silence: they are computed again.
    """
    found = [np.empty(0, RECORD)]
    if folder.exists() and not is_private(folder):
        rank_zero_warn(f"{folder}: expected a folder that only you can write to, found another; it is passed over.")
        return found[0]
    for file in sorted(path for path in folder.glob("*.npy") if path.is_file() and not path.is_symlink()):
        with contextlib.suppress(FileNotFoundError):
            content = file.read_bytes()
            if _name_of(content) != file.name:
                rank_zero_warn(
                    f"{file}: expected a whole file of reference log-probs, found a damaged one; it is passed over, "
                    "and what it held is computed again where it is needed."
                )
                continue
            found.append(np.load(io.BytesIO(content), allow_pickle=False))
    return np.concatenate(found)


def write_records(folder: Path, records: _Array) -> None:
    """Adds records; the file is flushed when this returns.

    A folder that cannot be written to is worth a warning: the run has its values, only the next one will not.
    """
    if not len(records):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not is_private(folder):
            raise PermissionError(errno.EPERM, "others can write there, too")
        _write_whole(folder, records)
        files = sorted(folder.glob("*.npy"))
        if len(files) > _MOST_FILES:
            records = read_records(folder)
            whole = _write_whole(folder, records[np.unique(records["key"], return_index=True)[1]])
            for file in {*files} - {whole}:
                file.unlink(missing_ok=True)
    except OSError as error:
        rank_zero_warn(
            f"{folder}: reference log-probs could not be written ({error.strerror}); this run goes on with them, a "
            "later one will compute them again. model.cache_folder names another place."
        )


def _write_whole(folder: Path, records: _Array) -> Path:
    content = io.BytesIO()
    np.save(content, np.sort(records, order="key", kind="stable"), allow_pickle=False)
    target = folder / _name_of(content.getvalue())
    with written_whole(target) as partial:
        partial.write_bytes(content.getvalue())
    return target


def _name_of(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()[:32]}.npy"
