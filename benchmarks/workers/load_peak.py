"""Peak memory of one process of two while a model is loaded and cut up; run by torchrun, one process for each rank."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from bco_lightning import BCOModule, FeedbackDataModule, LoraSettings
from bco_lightning.parallel.strategy import named_strategy


class LoadingPeak(Callback):
    """Memory that this process alone has, from before the model is built to after it is cut up, in MiB."""

    def __init__(self) -> None:
        self.before = self.peak = self.after = 0.0
        self._done = False

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Begins to watch; rows are tokenized by now."""
        self.before = self.peak = own_mib()
        threading.Thread(target=self._watch, daemon=True).start()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Stops watching."""
        self._done, self.after = True, own_mib()

    def _watch(self) -> None:
        while not self._done:
            self.peak = max(self.peak, own_mib())
            time.sleep(0.001)


def own_mib() -> float:
    """Anonymous memory: pages of mapped files, which processes share and the system may take back, do not count."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> None:
    """Loads as the command line says and writes the figures to a file for each rank."""
    how = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    peak = LoadingPeak()
    module = BCOModule(
        how["model"],
        dtype=how["dtype"],
        lora=LoraSettings() if how["lora"] else None,
        reference_log_probs="online" if how["lora"] else "auto",
    )
    data = FeedbackDataModule(how["log"], batch_size=1, max_length=32, validation_fraction=0.0, chat_template="plain")
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=named_strategy(how["strategy"]),
        max_steps=how["steps"],
        callbacks=[peak],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data)
    figures = {"peak_mib": peak.peak - peak.before, "after_mib": peak.after - peak.before}
    Path(f"{how['output']}.{trainer.global_rank}").write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
