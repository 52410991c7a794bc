"""Write the scores of ``predict`` as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from bco_lightning.batch import ScoredRows
from bco_lightning.module import BCOModule


class PredictionWriter(Callback):
    """Writes one line for each scored row, in file order: where it stands, its implicit reward, and P(thumbs-up).

    The file appears under its name only when it is complete. With several processes each writes a file of its own.

    Args:
        path: File to write. With several processes ``.rank0`` and so on goes before its suffix.
    """

    def __init__(self, path: str = "predictions.jsonl") -> None:
        self.path = Path(path)
        self._file: TextIO | None = None
        self._places: list[str] = []

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: BCOModule) -> None:  # type: ignore[override]
        if trainer.world_size > 1:
            self.path = self.path.with_suffix(f".rank{trainer.global_rank}{self.path.suffix}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._places = list(trainer.datamodule.predict_dataset["place"])  # type: ignore[attr-defined]
        self._partial.unlink(missing_ok=True)  # it may be a link that leads elsewhere
        self._file = self._partial.open("x", encoding="utf-8")

    @override
    def on_predict_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: BCOModule,
        outputs: ScoredRows,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        probabilities = torch.sigmoid(outputs.rewards_B.cpu().double() - outputs.reward_shift)
        for row in range(len(probabilities)):
            record = {
                "row": self._places[int(outputs.row_ids_B[row])],
                "implicit_reward": float(outputs.rewards_B[row]),
                "probability_up": float(probabilities[row]),
                "policy_log_prob": float(outputs.policy_log_probs_B[row]),
                "reference_log_prob": float(outputs.reference_log_probs_B[row]),
                "completion_tokens": int(outputs.completion_lengths_B[row]),
            }
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")  # type: ignore[union-attr]

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: BCOModule) -> None:  # type: ignore[override]
        self._file.close()  # type: ignore[union-attr]
        self._partial.replace(self.path)
        rank_zero_info(f"scores of {len(self._places)} rows: {self.path}")

    @override
    def on_exception(self, trainer: Trainer, pl_module: BCOModule, exception: BaseException) -> None:  # type: ignore[override]
        if self._file is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    @property
    def _partial(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")
