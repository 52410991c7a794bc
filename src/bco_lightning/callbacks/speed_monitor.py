"""Log how fast a run trains, and how much of what the device could do that is."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from bco_lightning.batch import FeedbackBatch, StepSummary, micro_batches_of
from bco_lightning.callbacks.step_callback import StepCallback, is_time_to_log, log_step
from bco_lightning.models.build import dtype_of_matrices
from bco_lightning.models.layout import layout_of
from bco_lightning.models.useful_flops import UsefulFlops
from bco_lightning.parallel.collectives import max_over_ranks

if TYPE_CHECKING:
    from bco_lightning.module import BCOModule

_GIB = 2**30
_COUNTS = ("rows", "tokens", "positions", "padding", "flops")


class SpeedMonitor(StepCallback):
    """Logs speed, waste and peak memory of the optimizer steps since the last time, as ``speed/...``.

    ==================== ===============================================================================================
    tokens_per_second    tokens of all rows, prompt and completion, without padding, of all processes; those of a prompt
                         that several rows share count for each of them
    rows_per_second      rows of all processes
    padding_share        positions of padding among the positions computed, 0 to 1
    mfu                  useful FLOPs per second, see :class:`~bco_lightning.models.useful_flops.UsefulFlops`, as a
                         share of what the data sheet of the device promises for the data type computed in, 0 to 1; only
                         on devices that Lightning's table knows, which has no CPU
    peak_memory_gib      largest since the start, of the process that took most: memory of tensors on CUDA, of the whole
                         process elsewhere
    ==================== ===============================================================================================

    Lightning's ``ThroughputMonitor`` would take every batch for one of the same size and wait for the device after
    each. Here counts come from the batches, which know them without asking the device, are summed with all else that
    processes tell each other of a step, and the device is waited for when values are logged, every
    ``trainer.log_every_n_steps`` optimizer steps. The clock stands still from the start of a validation, and of a
    checkpoint, to the next micro-batch; waiting for data counts.

    Args:
        clock: Seconds from any moment on.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._running_since: float | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(trainer.precision))
        peak = get_available_flops(trainer.strategy.root_device, mixed or dtype_of_matrices(pl_module.policy))
        self._peak_flops = (peak or 0) * trainer.world_size
        self._useful, self._layout = UsefulFlops.of(pl_module.policy), layout_of(pl_module.policy)
        self._of_step: Counter[str] = Counter()
        self._total: Counter[str] = Counter()  # of all processes, as `_seconds` since values were logged
        self._seconds, self._running_since = 0.0, None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: FeedbackBatch, batch_idx: int) -> None:
        if self._running_since is None:
            self._running_since = self._clock()
        for part in micro_batches_of(batch):
            padded = len(part) * max(part.lengths) if self._layout == "padded" else 0
            self._of_step["rows"] += len(part)
            self._of_step["tokens"] += part.num_tokens
            self._of_step["positions"] += padded or part.num_computed
            self._of_step["padding"] += padded and padded - part.num_tokens
            self._of_step["flops"] += self._useful.of_batch(part)

    @override
    def numbers_of_step(self, trainer: Trainer, module: Any) -> Mapping[str, float | Tensor]:
        own, self._of_step = self._of_step, Counter()
        return {name: float(own[name]) for name in _COUNTS}

    @override
    def names_logged(self, trainer: Trainer) -> list[str]:
        return [
            f"speed/{name}" for name in ("tokens_per_second", "rows_per_second", "padding_share", "peak_memory_gib")
        ]

    @override
    def on_step_end(self, trainer: Trainer, module: BCOModule, summary: StepSummary) -> None:
        self._total.update({name: int(summary.totals[name]) for name in _COUNTS})
        if not is_time_to_log(trainer, summary.step):
            return
        device = trainer.strategy.root_device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)  # what was asked for is still being computed
        self._stop()
        self._running_since = self._clock()
        most = torch.tensor([self._seconds, float(peak_memory(device))], dtype=torch.float64)
        seconds, memory = max_over_ranks(most, trainer).tolist()
        values = {
            "speed/tokens_per_second": self._total["tokens"] / seconds,
            "speed/rows_per_second": self._total["rows"] / seconds,
            "speed/padding_share": self._total["padding"] / self._total["positions"],
            "speed/peak_memory_gib": memory / _GIB,
        }
        if self._peak_flops:
            values["speed/mfu"] = self._total["flops"] / seconds / self._peak_flops
        self._seconds, self._total = 0.0, Counter()
        log_step(trainer, values, summary.step)
        module.log("tok/s", torch.tensor(values["speed/tokens_per_second"]), prog_bar=True, logger=False)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._stop()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._running_since is not None:
            self._seconds += self._clock() - self._running_since
            self._running_since = None


def peak_memory(device: torch.device) -> int:
    """The most memory that was in use at any time, in bytes: of tensors on CUDA, of this process elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        # Unlike ru_maxrss it does not begin with what the process that started this one had.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024
    except (OSError, IndexError):
        import resource

        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1024 if Path("/proc").exists() else 1)
