"""The importance weights of one run: found before its first step, or those of the checkpoint that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.errors import CheckpointError, ConfigError
from bco_lightning.importance.features import make_encoder
from bco_lightning.importance.weights import Encoder, ImportanceWeights, StepWeigher, find_weights
from bco_lightning.options import ModelOptions
from bco_lightning.places import cache_root
from bco_lightning.reference.model import Reference


class PromptWeighing:
    """Finds the weights, and brings them to the rows.

    Rows of a table have them as a column; rows of a stream are weighed as their turn comes.

    Args:
        options: Those of the module.

    Attributes:
        weights: The weights, once they are known.
        in_step: Weighs rows of a stream, where prompts were shown to tell the classes apart.
    """

    def __init__(self, options: ModelOptions) -> None:
        self._options = options
        self._encoder: Encoder | None = None
        self.weights: ImportanceWeights | None = None
        self.in_step: StepWeigher | None = None

    def start(self, data: FeedbackDataModule | None, reference: Reference, trainer: Any) -> None:
        """Weighs the training rows, if that is asked for.

        Raises:
            ConfigError: If it cannot be done, or nothing can be tested where weights are asked for by ``on``.
        """
        self.weights = self.in_step = None
        wanted = self._options.importance_weights
        if wanted == "off":
            return
        if data is None:
            raise ConfigError(
                "model.importance_weights", f"expected off where no FeedbackDataModule is used, found {wanted}."
            )
        weights = self.find(data, reference, trainer)
        self.take(weights, data)
        if problem := weights.problem(wanted):
            raise problem

    def find(self, data: FeedbackDataModule, reference: Reference, trainer: Any) -> ImportanceWeights:
        """Finds the weights of rows that a data module has read, of a stream those of a sample."""
        options, folder = self._options, cache_root(self._options.cache_folder) / "importance_weights"
        depends_on = {"weights": reference.digest, "dtype": str(reference.dtype)}
        before_training = partial(reference.before_training, trainer)
        self._encoder = make_encoder(options.prompt_features, before_training, depends_on)
        return find_weights(data, self._encoder, options.importance_clip, folder=folder, trainer=trainer)

    def take(self, weights: ImportanceWeights, data: FeedbackDataModule | None) -> None:
        """Uses these weights from now on."""
        self.weights = weights
        if data is None:
            return
        if not data.options.streaming:
            data.set_column("train", "importance_weight", weights.row_weights)
        elif weights.ratio.has_evidence and self._encoder is not None:
            self.in_step = StepWeigher(self._encoder, weights.ratio)

    def load_state_dict(self, state: Mapping[str, Any] | None, data: FeedbackDataModule | None) -> None:
        """Goes on with the bits of a run that had the same rows, encoder and options.

        Raises:
            CheckpointError: If they are weights of another version.
        """
        if state is None or self._options.importance_weights == "off":
            return
        try:
            if self.weights is None or self.weights.key == state["told"]["key"]:
                self.take(ImportanceWeights.from_state_dict(state), data)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "checkpoint",
                f"expected importance weights as this version writes them, found others ({error}).",
                "Use the version that wrote it.",
            ) from error
