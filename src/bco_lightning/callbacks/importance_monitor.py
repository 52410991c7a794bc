"""Show at the start of a run how far its importance weights can be trusted."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from typing_extensions import override

from bco_lightning.callbacks.loggers import show_table
from bco_lightning.callbacks.metrics_file import telling
from bco_lightning.callbacks.run_checkpoint import run_folder_of
from bco_lightning.importance.report import print_trust, trust_rows

if TYPE_CHECKING:
    from bco_lightning.module import BCOModule

_NUMBERS = ("log_loss", "constant_log_loss", "effective_share", "mass", "at_low", "at_high", "auc", "matched_auc")


class ImportanceMonitor(Callback):
    """Before the first step: prints the trust report, logs it as ``importance/...``, writes ``importance.json``.

    Numbers go to every logger, the verdict to those that show text, the histogram of weights to TensorBoard; what they
    mean is said at :class:`~bco_lightning.importance.report.TrustReport`. No text of a prompt is shown or written.
    Nothing happens where importance weights are off.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: BCOModule) -> None:  # type: ignore[override]
        run_folder = run_folder_of(trainer)  # a broadcast: every process has to ask
        importance = pl_module.importance
        if importance is None or not trainer.is_global_zero:
            return
        report, step = importance.report, trainer.global_step
        print_trust(report, Console())
        known = {name: getattr(report, name) for name in _NUMBERS}
        numbers = {f"importance/{name}": getattr(n, "value", n) for name, n in known.items() if n is not None}
        for logger in trainer.loggers:
            logger.log_metrics(dict(numbers), step=step)
            if isinstance(logger, TensorBoardLogger) and len(importance.down_weights):
                weights = importance.down_weights.detach().cpu()
                with telling(Path(logger.log_dir) / "importance/weights", makes_folder=False):
                    logger.experiment.add_histogram("importance/weights", weights, step)
        rows = [("verdict", report.verdict), *(("warning", text) for text in report.warnings), *trust_rows(report)]
        show_table(trainer.loggers, "importance/verdict", ("what", "value"), rows, step)
        if run_folder is not None:
            run_folder.mkdir(parents=True, exist_ok=True)
            written = json.dumps(asdict(report), indent=2, allow_nan=False) + "\n"
            (run_folder / "importance.json").write_text(written, encoding="utf-8")
