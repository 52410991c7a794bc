"""Rewards of all held-out rows at the newest validation: into the run's folder, and as pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from typing_extensions import override

from bco_lightning import figures
from bco_lightning.batch import ScoredRows
from bco_lightning.callbacks.loggers import show, shows_figures, telling
from bco_lightning.callbacks.run_checkpoint import run_folder_of
from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.metrics import Array, Auc, auc
from bco_lightning.parallel.collectives import gather_over_ranks

HELD_OUT_FILE = "held_out.json"
_COLUMNS = ("row_ids_B", "rewards_B", "thumbs_up_B", "completion_lengths_B")


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows at the newest validation: implicit rewards in nats, thumbs, tokens of the completion, prompts."""

    step: int
    reward_shift: float
    rewards: Array
    thumbs_up: Array
    lengths: Array
    prompts: Array  # the same number for the same prompt

    @classmethod
    def read(cls, run_folder: Path) -> HeldOut | None:
        """What a run left in its folder, if it has looked at rows and found numbers."""
        file = run_folder / HELD_OUT_FILE
        values: Any = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        arrays: Any = {name: np.array(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**arrays) if values.get("rewards") and np.isfinite(arrays["rewards"]).all() else None

    @property
    def area(self) -> Auc | None:
        """Probability that a thumbs-up row is rewarded more than a thumbs-down one, over prompts."""
        return auc(self.rewards, self.thumbs_up, self.prompts)

    @property
    def num_rarer(self) -> int:
        """Rows of the rarer class."""
        return int(min(self.thumbs_up.sum(), (~self.thumbs_up).sum()))

    @property
    def pictures(self) -> dict[str, Callable[[], Figure]]:
        """What draws each picture of them, by name; two need rows of both classes."""
        rows, shift = (self.rewards, self.thumbs_up), self.reward_shift
        drawn = {"rewards": partial(figures.reward_histogram, *rows, shift)}
        if self.num_rarer:
            drawn["roc"] = partial(figures.roc_of_rewards, *rows)
            drawn["reliability"] = partial(figures.reliability, *rows, shift)
        return {**drawn, "reward_by_length": partial(figures.reward_by_length, *rows, self.lengths)}


class HeldOutRows(Callback):
    """At each validation of a fit: ``held_out.json`` in the run's folder, and figures in loggers that show some.

    The file holds ``step``, ``reward_shift``, and of each held-out row, in file order, ``rewards`` in nats,
    ``thumbs_up``, ``lengths`` in tokens, and ``prompts``, the same number for the same prompt; no text. Figures are
    those of :mod:`bco_lightning.figures`: rewards by class, ROC curve, reliability, reward against length.
    """

    def __init__(self) -> None:
        self._rows: list[ScoredRows] = []

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._rows = []

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._rows.append(outputs["rows"])

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        data = getattr(trainer, "datamodule", None)
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or not isinstance(data, FeedbackDataModule):
            return
        own = [[value for each in self._rows for value in getattr(each, name).tolist()] for name in _COLUMNS]
        self._rows = []
        folder, parts = run_folder_of(trainer), gather_over_ranks(own, trainer)
        rows, rewards, thumbs, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
        if not trainer.is_global_zero or not len(rows):
            return
        order = np.argsort(rows)
        keys = np.asarray(data.validation_dataset["prompt_key"])[rows[order].astype(int)]  # type: ignore[index]
        found = HeldOut(
            step=trainer.global_step,
            reward_shift=pl_module.objective.threshold,
            rewards=rewards[order],
            thumbs_up=thumbs[order].astype(bool),
            lengths=lengths[order].astype(int),
            prompts=np.unique(keys, return_inverse=True)[1],
        )
        if folder is not None:
            told = {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in vars(found).items()}
            with telling(file := folder / HELD_OUT_FILE), written_whole(file, replaces=True) as unfinished:
                unfinished.write_text(json.dumps(told) + "\n", encoding="utf-8")
        if shows_figures(trainer.loggers) and np.isfinite(rewards).all():
            for name, picture in found.pictures.items():
                show("figure", trainer.loggers, f"held_out/{name}", picture(), trainer.global_step)
