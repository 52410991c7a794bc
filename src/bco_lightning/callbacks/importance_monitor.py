"""Show at the start of a run how far its importance weights can be trusted."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from typing_extensions import override

from bco_lightning.importance.report import TrustReport, print_trust, trust_rows

if TYPE_CHECKING:
    from bco_lightning.module import BCOModule

_NUMBERS = ("log_loss", "constant_log_loss", "effective_share", "mass", "at_low", "at_high")


class ImportanceMonitor(Callback):
    """Before the first step: prints the trust report, logs it as ``importance/...``, writes ``importance.json``.

    Numbers go to every logger, the histogram of weights and the verdict to TensorBoard; what they mean is said at
    :class:`~bco_lightning.importance.report.TrustReport`. No text of a prompt is shown or written. Nothing
    happens where importance weights are off.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: BCOModule) -> None:  # type: ignore[override]
        # A broadcast: every process has to ask. Without a logger there is no folder of the run.
        log_dir = trainer.log_dir if trainer.loggers else None
        importance = pl_module.importance
        if importance is None or not trainer.is_global_zero:
            return
        report = importance.report
        print_trust(report, Console())
        for logger in trainer.loggers:
            logger.log_metrics(_scalars(report), step=trainer.global_step)
            if isinstance(logger, TensorBoardLogger):
                _write_details(logger.experiment, report, importance.down_weights, trainer.global_step)
        if log_dir is not None:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            written = json.dumps(asdict(report), indent=2, allow_nan=False) + "\n"
            (Path(log_dir) / "importance.json").write_text(written, encoding="utf-8")


def _scalars(report: TrustReport) -> dict[str, float]:
    """The numbers that are known."""
    known = {name: getattr(report, name) for name in _NUMBERS}
    known |= {name: area and area.value for name, area in (("auc", report.auc), ("matched_auc", report.matched_auc))}
    return {f"importance/{name}": value for name, value in known.items() if value is not None}


def _write_details(writer: Any, report: TrustReport, down_weights: Any, step: int) -> None:
    if len(down_weights):
        writer.add_histogram("importance/weights", down_weights.detach().cpu(), step)
    said = "\n\n".join([report.verdict, *(f"Warning: {warning}" for warning in report.warnings)])
    rows = "\n".join(f"| {name} | {value} |" for name, value in [("", ""), ("---", "---"), *trust_rows(report)])
    writer.add_text("importance/verdict", f"{said}\n\n{rows}", step)
