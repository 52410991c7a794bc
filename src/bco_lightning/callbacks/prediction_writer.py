"""Write the scores of ``predict`` as JSON lines."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from bco_lightning.batch import ScoredRows
from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.places import require_free


class PredictionWriter(Callback):
    """Writes one line for each scored row, in file order: where it stands, its implicit reward, and P(thumbs-up).

    The file appears under its name only when it is complete, and replaces none. With several processes each writes a
    file of its own.

    Args:
        path: File to write. With several processes ``.rank0`` and so on goes before its suffix.
    """

    def __init__(self, path: str = "predictions.jsonl") -> None:
        self.path = Path(path)
        self._file: TextIO | None = None
        self._writing = ExitStack()
        self._places: list[str] = []

    def files(self, trainer: Any) -> list[Path]:
        """The file of each process."""
        number, suffix = trainer.world_size, self.path.suffix
        return [self.path.with_suffix(f".rank{rank}{suffix}") for rank in range(number)] if number > 1 else [self.path]

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for file in self.files(trainer) if stage == "predict" else ():
            require_free("predictions.path", file)

    @override
    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._places = list(trainer.datamodule.predict_dataset["place"])
        partial = self._writing.enter_context(written_whole(self.files(trainer)[trainer.global_rank], replaces=False))
        self._file = self._writing.enter_context(partial.open("x", encoding="utf-8"))

    @override
    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        rows: ScoredRows = outputs
        probabilities = torch.sigmoid(rows.rewards_B.cpu().double() - rows.reward_shift).tolist()
        columns = {
            "row": [self._places[row_id] for row_id in rows.row_ids_B.tolist()],
            "implicit_reward": rows.rewards_B.tolist(),
            "probability_up": probabilities,
            "policy_log_prob": rows.policy_log_probs_B.tolist(),
            "reference_log_prob": rows.reference_log_probs_B.tolist(),
            "completion_tokens": rows.completion_lengths_B.tolist(),
        }
        for values in zip(*columns.values(), strict=True):
            print(json.dumps(dict(zip(columns, values, strict=True)), ensure_ascii=False), file=self._file)

    @override
    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        self._writing.close()
        rank_zero_info(f"scores of {len(self._places)} rows: {self.files(trainer)[0]}")

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._writing.__exit__(type(exception), exception, exception.__traceback__)
