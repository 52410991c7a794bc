"""Rewards of all held-out rows at the newest validation: into the run's folder, and as pictures."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from bco_lightning import figures
from bco_lightning.batch import ScoredRows
from bco_lightning.callbacks.loggers import show_figure, shows_figures, telling
from bco_lightning.callbacks.run_checkpoint import run_folder_of
from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.parallel.collectives import gather_over_ranks

HELD_OUT_FILE = "held_out.json"
_COLUMNS = ("row_ids_B", "rewards_B", "thumbs_up_B", "completion_lengths_B")


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
        rows, rewards, lengths = rows[order].astype(int), rewards[order], lengths[order].astype(int)
        thumbs_up, shift = thumbs[order].astype(bool), pl_module.objective.threshold
        if folder is not None:
            keys = np.asarray(data.validation_dataset["prompt_key"])[rows]  # type: ignore[index]
            columns = {"rewards": rewards, "thumbs_up": thumbs_up, "lengths": lengths}
            columns["prompts"] = np.unique(keys, return_inverse=True)[1]
            values = {name: column.tolist() for name, column in columns.items()}
            with telling(file := folder / HELD_OUT_FILE), written_whole(file, replaces=True) as partial:
                told = {"step": trainer.global_step, "reward_shift": shift, **values}
                partial.write_text(json.dumps(told) + "\n", encoding="utf-8")
        if not (shows_figures(trainer.loggers) and np.isfinite(rewards).all()):
            return
        drawn = {"rewards": figures.reward_histogram(rewards, thumbs_up, shift)}
        drawn["reward_by_length"] = figures.reward_by_length(rewards, thumbs_up, lengths)
        if 0 < thumbs_up.sum() < len(thumbs_up):
            drawn["roc"] = figures.roc_of_rewards(rewards, thumbs_up)
            drawn["reliability"] = figures.reliability(rewards, thumbs_up, shift)
        for name, figure in drawn.items():
            show_figure(trainer.loggers, f"held_out/{name}", figure, trainer.global_step)
