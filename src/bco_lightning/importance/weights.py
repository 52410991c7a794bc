"""The importance weights of a run: found once before the first step, kept by content on disk, brought to the rows."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from bco_lightning.batch import FeedbackBatch
from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.data.collate import select_known
from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.data.images import ImageInputs
from bco_lightning.errors import CheckpointError, ConfigError, FaultError
from bco_lightning.identity import digest_of_tensors, digest_of_values
from bco_lightning.importance.features import ReferenceEncoder, SentenceEncoder
from bco_lightning.importance.ratio import DensityRatio, FittedRatio, clipped_ratios, fit_density_ratio, too_few
from bco_lightning.importance.report import TrustReport
from bco_lightning.metrics import Array
from bco_lightning.models.build import dtype_of_matrices
from bco_lightning.options import REFERENCE, ModelOptions, PromptFeatures
from bco_lightning.parallel.collectives import by_all, sum_over_ranks
from bco_lightning.places import cache_root
from bco_lightning.reference.model import Reference

MOST_PROMPTS = 20_000
_OPTION = "model.importance_weights"
METHOD_VERSION = 3  # to be raised when the same prompts and thumbs come to give other weights or another report
ALONE = SimpleNamespace(world_size=1, global_rank=0, is_global_zero=True, progress_bar_callback=None)
Encoder = ReferenceEncoder | SentenceEncoder


@dataclass(frozen=True)
class ImportanceWeights:
    """The density ratio of prompts, which gives the weight of any, and the weights of rows that it was fitted on."""

    ratio: DensityRatio
    report: TrustReport
    row_weights: Tensor  # float32; 1 for thumbs-up rows; of the training set, or of a sample of a stream
    thumbs_up: Tensor  # of these rows
    encoder: str  # fingerprint
    key: str  # digest of all that they depend on

    def problem(self, wanted: str) -> ConfigError | None:
        """Why a run with these weights is refused, if it is: ``on`` was asked for, and nothing could be tested."""
        if wanted != "on" or not self.report.why_not:
            return None
        problem = f"expected rows on which a classifier of prompts can be tested: {self.report.why_not}."
        return ConfigError(_OPTION, problem, "Set auto, which then leaves all weights at 1, or off.")

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, no prompt among them."""
        of_ratio = vars(self.ratio)
        tensors = {name: value for name, value in of_ratio.items() if isinstance(value, Tensor)}
        told: dict[str, Any] = {"ratio": {name: value for name, value in of_ratio.items() if name not in tensors}}
        told |= {"encoder_fingerprint": self.encoder, "key": self.key, "report": asdict(self.report)}
        return {"ratio": tensors, "rows": {"row_weights": self.row_weights, "thumbs_up": self.thumbs_up}, "told": told}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ImportanceWeights:
        """What :meth:`state_dict` was made of; a ``KeyError`` or ``TypeError`` if a value is missing or too many."""
        told = state["told"]
        ratio = DensityRatio(**state["ratio"], **{**told["ratio"], "clip": tuple(told["ratio"]["clip"])})
        report, others = TrustReport.from_values(told["report"]), (told["encoder_fingerprint"], told["key"])
        return cls(ratio, report, state["rows"]["row_weights"], state["rows"]["thumbs_up"], *others)

    def save(self, file: Path, *, rows: bool = False, **others: Any) -> None:
        """Writes a safetensors file, plain values as JSON in its metadata, with the weights of rows if asked for."""
        state = self.state_dict()
        tensors = {**state["ratio"], **(state["rows"] if rows else {})}
        told = {**state["told"], **others, "digest": digest_of_tensors(tensors.items())}
        save_file(tensors, file, metadata={name: json.dumps(value) for name, value in told.items()})


class PromptWeighing:
    """Finds the weights of one run, or takes those of the checkpoint that it goes on from, and brings them to the rows.

    Rows of a table have them as a column. Rows of a stream are weighed in the step, by the classifiers that have not
    seen their prompts; states of the reference are taken from the pass that the step makes anyway.
    """

    def __init__(self, options: ModelOptions) -> None:
        self._options = options
        self._encoder: Encoder | None = None
        self.weights: ImportanceWeights | None = None
        self.in_step = False

    def start(self, data: FeedbackDataModule | None, reference: Reference, trainer: Any) -> None:
        """Weighs the training rows, if that is asked for; refused where ``on`` asks for weights without a test."""
        self.weights, self.in_step = None, False
        if data is not None and data.train_dataset is not None:
            data.set_column("train", "importance_weight", None)  # an earlier fit may have left some
        if (wanted := self._options.importance_weights) == "off":
            return
        if data is None:
            raise ConfigError(_OPTION, f"expected off where no FeedbackDataModule is used, found {wanted}.")
        weights = self.find(data, reference, trainer)
        self._take(weights, data)
        if problem := weights.problem(wanted):
            raise problem

    def find(self, data: FeedbackDataModule, reference: Reference, trainer: Any) -> ImportanceWeights:
        """Looks the weights of rows, of a stream those of a sample, up on disk, or computes them.

        They are the same in every process, to the bit: each computes the features of a share of the prompts, the first
        one fits, and where it cannot, all fail.
        """
        options, began = self._options, time.monotonic()
        encoder = _encoder_of(options.prompt_features, reference, trainer, ImageInputs(data.tokenizer))
        self._encoder, trainer = encoder, trainer or ALONE
        prompts = _Prompts(data, encoder, trainer)
        key = prompts.key(options.importance_clip)
        file = cache_root(options.cache_folder) / "importance_weights" / f"{key}.safetensors"
        known: ImportanceWeights | None = by_all(partial(_read, file) if trainer.is_global_zero else dict, trainer)[0]
        if known is not None:
            return known
        ratio, log_ratios_P, report = prompts.fitted(options.importance_clip)
        weights_R, up_R = ratio.weights(log_ratios_P)[prompts.numbers_R], torch.from_numpy(prompts.up_R)
        # What is cut of a prompt for the reference is cut for training too, and counted there.
        if isinstance(encoder, SentenceEncoder):
            report = replace(report, num_truncated=encoder.num_truncated(prompts.dataset, prompts.first_rows_P))
        report = replace(report, seconds=time.monotonic() - began)
        row_weights = torch.where(up_R, 1.0, weights_R)
        weights = ImportanceWeights(ratio, report, row_weights, up_R, encoder.fingerprint, key)
        if trainer.is_global_zero:
            _write(weights, file)
        return weights

    def _take(self, weights: ImportanceWeights, data: FeedbackDataModule | None) -> None:
        self.weights = weights
        if data is not None and not data.options.streaming:
            data.set_column("train", "importance_weight", weights.row_weights)
        elif data is not None:
            self.in_step = weights.ratio.has_evidence and self._encoder is not None

    def watching(self, model: Any) -> AbstractContextManager[None]:
        """Within it a micro-batch is scored, the reference last, by it or by the policy without its adapter."""
        return cast(Encoder, self._encoder).watching(model)

    def weights_in_step(self, batch: FeedbackBatch) -> Tensor:
        """Weights of a micro-batch that was just scored, for those with thumbs-down; shape ``(B,)``, float32."""
        ratio = cast(ImportanceWeights, self.weights).ratio
        features_BH = cast(Encoder, self._encoder).features_in_step(batch)
        return ratio.weights(ratio.log_ratios(features_BH, cast(Tensor, batch.prompt_keys_B)))

    def load_state_dict(self, state: Mapping[str, Any] | None, data: FeedbackDataModule | None) -> None:
        """Goes on with the bits of a run that had the same rows, encoder and options."""
        if state is None or self._options.importance_weights == "off":
            return
        try:
            if self.weights is None or self.weights.key == state["told"]["key"]:
                self._take(ImportanceWeights.from_state_dict(state), data)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"expected importance weights as this version writes them, found others ({error})."
            raise CheckpointError("checkpoint", problem, "Use the version that wrote it.") from error


def _encoder_of(features: PromptFeatures, reference: Reference, trainer: Any, images: ImageInputs) -> Encoder:
    if features.encoder == REFERENCE:
        dtype, model = str(dtype_of_matrices(reference.policy)), partial(reference.before_training, trainer)
        depends_on = {"weights": reference.digest, "dtype": dtype, "processor": images.digest()}
        return ReferenceEncoder(features, model, depends_on, images)
    with reference.where_it_is_used(trainer) as device:
        return SentenceEncoder(features.encoder, device)


class _Prompts:
    """Distinct prompts in the order of their keys, ``P``, and the prompt of each row, ``R``, as a place among them."""

    def __init__(self, data: FeedbackDataModule, encoder: Encoder, trainer: Any) -> None:
        self.dataset, self._encoder, self._trainer = data.training.table(MOST_PROMPTS), encoder, trainer
        keys_R, self.up_R = (np.array(self.dataset.data.column(name)) for name in ("prompt_key", "thumbs_up"))
        passes_R = data.training.passes_of(self.dataset)
        passes_R = np.ones(len(keys_R)) if passes_R is None else passes_R
        self.keys_P, self.first_rows_P, self.numbers_R = np.unique(keys_R, return_index=True, return_inverse=True)
        self.num_up_P, self.num_down_P = (
            np.bincount(self.numbers_R, passes_R * chosen, len(self.keys_P)) for chosen in (self.up_R, ~self.up_R)
        )

    def key(self, clip: Sequence[float]) -> str:
        """A digest of all that weights depend on."""
        rows = hashlib.sha256()
        for values in (self.keys_P, self.num_up_P, self.num_down_P, self.numbers_R, self.up_R):
            rows.update(values.tobytes())
        tokens = select_known(self.dataset, ("input_ids", "completion_mask")).with_format("arrow")
        for some in np.array_split(self.first_rows_P, len(self.first_rows_P) // 1000 + 1):  # what the reference sees
            for lists in tokens.select(some)[:].columns:
                rows.update(np.asarray(pc.list_value_length(lists)).tobytes())
                rows.update(np.asarray(pc.list_flatten(lists)).tobytes())
        described = {"version": METHOD_VERSION, "encoder": self._encoder.fingerprint, "clip": list(clip)}
        return digest_of_values({**described, "rows": rows.hexdigest()})[:32]

    def fitted(self, clip: tuple[float, float]) -> FittedRatio:
        """The density ratio with its report, and the log ratio of each prompt; the same in every process."""
        # Keys are digests: the lowest ones are a random choice.
        fitted_on, others = np.split(np.arange(len(self.keys_P)), [MOST_PROMPTS])
        counts = self.num_up_P[fitted_on], self.num_down_P[fitted_on], self.keys_P[fitted_on]
        # Features take long, and are not needed to see that there are too few rows.
        features = torch.zeros(len(fitted_on), 0) if too_few(*counts) else self._apply(lambda of, _: of, fitted_on)

        def fit() -> FittedRatio:
            try:
                return fit_density_ratio(features, *counts, clip=clip, encoder=self._encoder.name)
            except Exception as error:  # whatever it is, the other processes end with the same words
                problem = f"expected to find them, found that it failed ({type(error).__name__}: {error})."
                raise FaultError(_OPTION, problem, "Set off to train without them.") from error

        ratio, log_ratios_P, report = by_all(fit if self._trainer.is_global_zero else dict, self._trainer)[0]
        num_up, num_down = float(self.num_up_P.sum()), float(self.num_down_P.sum())
        report = replace(report, num_prompts=len(self.keys_P), num_up=num_up, num_down=num_down)
        if len(others) and ratio.has_evidence:
            keys_P = torch.from_numpy(self.keys_P)
            found = self._apply(lambda of, places: ratio.log_ratios(of, keys_P[places])[:, None], others)
            log_ratios_P = torch.cat([log_ratios_P.double(), found[:, 0].double()])
            mean = np.average(clipped_ratios(log_ratios_P, clip).numpy(), weights=self.num_down_P)
            ratio = replace(ratio, normaliser=float(mean))
        elif len(others):
            log_ratios_P = torch.zeros(len(self.keys_P))
        return FittedRatio(ratio, log_ratios_P, report)

    def _apply(self, function: Callable[[Tensor, Array], Tensor], chosen: Array) -> Tensor:
        """``(chosen, columns)``: what is made of the features and the places of prompts, which are side by side.

        Every process makes as many passes, as sharded models need it: one without a batch of its own repeats another's.
        """
        trainer, batches = self._trainer, self._encoder.batches(self.dataset, self.first_rows_P[chosen])
        made: Any = None
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        with tqdm(total=len(chosen), desc="prompt features", unit="prompt", disable=not shown) as bar:
            while group := list(islice(batches, trainer.world_size)):
                rows, batch = group[trainer.global_rank % len(group)]
                places = self.numbers_R[rows]
                values = function(self._encoder.features(batch), places)
                if made is None:
                    made = values.new_zeros(len(chosen), values.shape[1])
                if trainer.global_rank < len(group):
                    made[places - chosen[0]] = values
                bar.update(sum(len(rows) for rows, _ in group))
        return sum_over_ranks(made, trainer)


def _read(file: Path) -> ImportanceWeights | None:
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            told = {name: json.loads(text) for name, text in opened.metadata().items()}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if digest_of_tensors(tensors.items()) != told["digest"]:
            raise ValueError("the digest is another")
        rows = {name: tensors.pop(name) for name in ("row_weights", "thumbs_up")}
        return ImportanceWeights.from_state_dict({"ratio": tensors, "rows": rows, "told": told})
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        rank_zero_warn(
            f"{file}: expected importance weights of an earlier run, found that they cannot be used "
            f"({type(error).__name__}); they are computed again."
        )
        return None


def _write(weights: ImportanceWeights, file: Path) -> None:
    """A folder that cannot be written to is worth a warning: the run has its weights, only the next one will not."""
    try:
        with written_whole(file) as partial_file:
            weights.save(partial_file, rows=True)
    except (SafetensorError, OSError):
        rank_zero_warn(
            f"{file}: importance weights could not be written; this run goes on with them, a later one will compute "
            "them again. model.cache_folder names another place."
        )
