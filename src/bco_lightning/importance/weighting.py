"""The importance weights of a training set: found once before the first step, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from bco_lightning.checkpointing import read_checkpoint, write_checkpoint
from bco_lightning.distributed import gather_over_ranks, sum_tensor_over_ranks
from bco_lightning.errors import CheckpointError, FaultError, UserError
from bco_lightning.identity import digest_of_values
from bco_lightning.importance.density_ratio import (
    MOST_PROMPTS,
    DensityRatio,
    FittedRatio,
    clipped_ratios,
    fit_density_ratio,
    too_few,
)
from bco_lightning.importance.encoding import PromptEncoder
from bco_lightning.importance.prompt_table import PromptTable
from bco_lightning.importance.trust import make_report
from bco_lightning.importance.trust_report import TrustReport

METHOD_VERSION = 1  # to be raised when the same prompts and thumbs come to give other weights or another report
ALONE = SimpleNamespace(world_size=1, global_rank=0, is_global_zero=True, progress_bar_callback=None)
_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ImportanceWeights:
    """The density ratio of prompts, fitted, and what it gives the rows that it was fitted on.

    Args:
        ratio: Gives the weight of any prompt.
        report: How far it can be trusted.
        row_weights: Weight of each thumbs-down row, and 1 for each thumbs-up row, of the training set or of a sample
            of a stream; shape ``(rows,)``, float32.
        thumbs_up: Thumbs of these rows; bool.
        encoder: Fingerprint of the prompt encoder.
        key: Digest of all that they depend on.
    """

    ratio: DensityRatio
    report: TrustReport
    row_weights: Tensor
    thumbs_up: Tensor
    encoder: str
    key: str

    @property
    def down_weights(self) -> Tensor:
        """Weights of the thumbs-down rows, float32."""
        return self.row_weights[~self.thumbs_up]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, no prompt among them."""
        return {
            "ratio": self.ratio.state_dict(),
            "report": self.report.to_values(),
            "row_weights": self.row_weights,
            "thumbs_up": self.thumbs_up,
            "encoder": self.encoder,
            "key": self.key,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ImportanceWeights:
        """What :meth:`state_dict` was made of."""
        return cls(
            DensityRatio.from_state_dict(state["ratio"]),
            TrustReport.from_values(state["report"]),
            state["row_weights"],
            state["thumbs_up"],
            state["encoder"],
            state["key"],
        )

    def save(self, file: Path, **others: Any) -> None:
        """Writes what the weight of any prompt takes as a safetensors file; scalars and the report are its metadata.

        Args:
            file: The file.
            others: Plain values to go with it.
        """
        values = self.ratio.state_dict()
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        scalars = {name: value for name, value in values.items() if name not in tensors}
        told = {**others, "encoder_fingerprint": self.encoder, "ratio": scalars, "report": self.report.to_values()}
        save_file(tensors, file, metadata={name: json.dumps(value) for name, value in told.items()})


def find_weights(
    dataset: Any,
    encoder: PromptEncoder,
    clip: tuple[float, float],
    *,
    folder: Path,
    row_passes: _Array | None = None,
    trainer: Any = ALONE,
) -> ImportanceWeights:
    """Looks the weights of a data set up on disk, or computes them; the same in every process, to the bit.

    Every process computes the features of a share of the prompts; the first one fits.

    Args:
        dataset: Training rows, or a sample of a stream; the same in every process.
        encoder: Makes features of prompts.
        clip: Least and largest density ratio.
        folder: Where results are kept: numbers and digests, no text.
        row_passes: How often an epoch draws each row; once if left out.
        trainer: The Lightning trainer, if there is one.

    Returns:
        The weights.

    Raises:
        FaultError: If the first process cannot fit; in all of them.
    """
    table = PromptTable.of(dataset, row_passes)
    up = torch.from_numpy(np.array(dataset.data.column("thumbs_up"), dtype=bool))
    key = _key(table, encoder, clip, up.numpy())
    known = _of_first_process(lambda: _read(folder / key), trainer)
    if known is not None:
        return ImportanceWeights.from_state_dict(known)
    began = time.monotonic()
    prompts = _Prompts(dataset, table, encoder, trainer)
    ratio, report, log_ratios = _fitted(prompts, clip)

    def finish() -> dict[str, Any]:
        weights = ImportanceWeights(
            ratio,
            replace(
                report,
                num_up=float(table.num_up.sum()),
                num_down=float(table.num_down.sum()),
                num_prompts=len(table),
                num_truncated=encoder.num_truncated(dataset, table.first_rows),
                seconds=time.monotonic() - began,
            ),
            torch.where(up, 1.0, ratio.weights(log_ratios)[torch.from_numpy(table.numbers)]),
            up,
            encoder.fingerprint,
            key,
        )
        _write(weights.state_dict(), folder / key)
        return weights.state_dict()

    return ImportanceWeights.from_state_dict(_of_first_process(finish, trainer))


def _fitted(prompts: _Prompts, clip: tuple[float, float]) -> tuple[DensityRatio, TrustReport, Tensor]:
    """The density ratio with its report, and the log ratio of each prompt; the same in every process."""
    table = prompts.table
    fitted_on = np.sort(np.argsort(table.keys, kind="stable")[:MOST_PROMPTS])  # keys are hashes: a random choice
    counts = table.num_up[fitted_on], table.num_down[fitted_on], table.folds[fitted_on]
    # Features take long, and are not needed to see that there are too few rows.
    features = torch.zeros(len(fitted_on), 0) if too_few(*counts) else prompts.apply(fitted_on, lambda of, _: of)

    def fit() -> tuple[FittedRatio, TrustReport]:
        fitted = fit_density_ratio(features, *counts, clip=clip)
        return fitted, make_report(fitted, features, *counts, table.first_rows[fitted_on], encoder=prompts.encoder.name)

    fitted, report = _of_first_process(fit, prompts.trainer)
    ratio = fitted.ratio
    log_ratios = torch.zeros(len(table), dtype=torch.float64)
    log_ratios[fitted_on] = fitted.log_ratios_P.double()
    others = np.setdiff1d(np.arange(len(table)), fitted_on)
    if len(others) and ratio.has_evidence:
        folds = torch.from_numpy(table.folds)
        log_ratios[others] = prompts.apply(
            others, lambda of, numbers: ratio.log_ratios(of.double(), folds[numbers])[:, None]
        )[:, 0]
        mean = np.average(clipped_ratios(log_ratios, clip).numpy(), weights=table.num_down)
        ratio = replace(ratio, normaliser=float(mean))
    return ratio, report, log_ratios


class _Prompts:
    """The distinct prompts of a data set, a share of them for each process."""

    def __init__(self, dataset: Any, table: PromptTable, encoder: PromptEncoder, trainer: Any) -> None:
        self._dataset, self.table, self.encoder, self.trainer = dataset, table, encoder, trainer

    def apply(self, chosen: _Array, function: Callable[[Tensor, _Array], Tensor]) -> Tensor:
        """Numbers of each chosen prompt, ``(chosen, columns)``, made of its features and its place in the table.

        Every process makes as many passes, as sharded models need it: one without a batch of its own repeats another's.
        """
        table, trainer = self.table, self.trainer
        places = np.full(len(table.keys), -1)
        places[chosen] = np.arange(len(chosen))
        batches = self.encoder.batches(self._dataset, table.first_rows[chosen])
        found: Tensor | None = None
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        with tqdm(total=len(chosen), desc="prompt features", unit="prompt", disable=not shown) as bar:
            while group := list(islice(batches, trainer.world_size)):
                rows, batch = group[trainer.global_rank % len(group)]
                prompts = table.numbers[rows]
                values = function(self.encoder.features(batch), prompts)
                if found is None:
                    found = values.new_zeros(len(chosen), values.shape[1])
                if trainer.global_rank < len(group):
                    found[places[prompts]] = values
                bar.update(sum(len(rows) for rows, _ in group))
        return sum_tensor_over_ranks(found, trainer)  # type: ignore[arg-type]


def _of_first_process(make: Callable[[], Any], trainer: Any) -> Any:
    """What the first process makes, or raises, in every process."""
    made: Any = None
    fault: UserError | None = None
    if trainer.is_global_zero:
        try:
            made = make()
        except UserError as error:
            fault = error
        except Exception as error:  # the others are waiting, whatever it is
            if trainer.world_size == 1:
                raise
            fault = FaultError(
                "model.importance_weights",
                f"expected the first process to find them, found that it failed ({type(error).__name__}: {error}).",
                "Set off to train without them.",
            )
    ((made, fault), *_) = gather_over_ranks((made, fault), trainer)
    if fault is not None:
        raise fault
    return made


def _key(table: PromptTable, encoder: PromptEncoder, clip: tuple[float, float], thumbs_up: _Array) -> str:
    digest = hashlib.sha256(thumbs_up.tobytes())
    for values in (table.keys, table.num_up, table.num_down, table.numbers):
        digest.update(values.tobytes())
    described = {
        "version": METHOD_VERSION,
        "encoder": encoder.fingerprint,
        "clip": list(clip),
        "rows": digest.hexdigest(),
    }
    return digest_of_values(described)[:32]


def _read(target: Path) -> dict[str, Any] | None:
    try:
        if not target.is_dir():
            return None
        state = read_checkpoint(str(target))
        ImportanceWeights.from_state_dict(state)
    except (UserError, OSError, KeyError, TypeError, ValueError) as error:
        rank_zero_warn(
            f"{target}: expected importance weights of an earlier run, found that they cannot be used "
            f"({type(error).__name__}); they are computed again."
        )
        return None
    return state


def _write(state: Mapping[str, Any], target: Path) -> None:
    """A folder that cannot be written to is worth a warning: the run has its weights, only the next one will not."""
    try:
        write_checkpoint(state, target)
    except (CheckpointError, OSError):
        rank_zero_warn(
            f"{target}: importance weights could not be written; this run goes on with them, a later one will compute "
            "them again. model.cache_folder names another place."
        )
