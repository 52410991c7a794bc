"""Log how fast a run trains, and how much of what the device could do that is."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from typing_extensions import override

from bco_lightning.batch import FeedbackBatch, StepSummary
from bco_lightning.callbacks.step_callback import StepCallback, log_step
from bco_lightning.distributed import max_over_ranks, sum_over_ranks
from bco_lightning.models.useful_flops import UsefulFlops
from bco_lightning.module import BCOModule

_GIB = 2**30
_MEASURING_SECONDS = 0.2


class ThroughputMonitor(StepCallback):
    """Logs speed, waste and peak memory of the optimizer steps since the last time, as ``speed/...``.

    ==================== ===============================================================================================
    tokens_per_second    tokens of all rows, prompt and completion, without padding, of all processes; those of a prompt
                         that several rows share count for each of them
    rows_per_second      rows of all processes
    padding_share        positions of padding among the positions computed, 0 to 1
    ceiling_share        useful FLOPs per second, see :class:`UsefulFlops`, as a share of what a large matrix product
                         reaches on this device in the data type computed in, see :func:`matmul_ceiling`; 0 to 1
    peak_memory_gib      largest since the start, of the process that took most: memory of tensors on CUDA, of the whole
                         process elsewhere
    ==================== ===============================================================================================

    Counts come from the batches, which know them without asking the device; the device is waited for when values are
    logged, every ``trainer.log_every_n_steps`` optimizer steps, and when the clock stops. It stops when a validation
    begins and when Lightning collects a checkpoint, and goes on with the next micro-batch; waiting for data counts.

    Lightning has a callback of this name. It waits for the device after every micro-batch, takes the FLOPs of a batch
    and its size for constants, counts the writing of checkpoints as training, logs rank 0's numbers times the number of
    processes, and takes the ceiling from a table of data sheets that knows no CPU; so nothing of it is used.

    Args:
        clock: Seconds from any moment on.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._running_since: float | None = None
        self._flops: UsefulFlops | None = None
        self._forget()

    def _forget(self) -> None:
        self._seconds = 0.0
        self._tokens = self._rows = self._positions = self._padding = self._work = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: BCOModule) -> None:  # type: ignore[override]
        self._running_since = None
        self._flops = pl_module.useful_flops
        self._forget()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: BCOModule, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if self._running_since is None:
            self._running_since = self._clock()

    @override
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: BCOModule, outputs: Any, batch: FeedbackBatch, batch_idx: int
    ) -> None:
        self._count(batch, pl_module.layout)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_step_end(self, trainer: Trainer, module: BCOModule, summary: StepSummary) -> None:
        step = summary.step
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not interval or step % interval:
            return
        self._stop(trainer)
        values = self._values(trainer, module)
        self._forget()
        self._running_since = self._clock()
        log_step(trainer, module, values, step)
        module.log("tok/s", values["speed/tokens_per_second"], prog_bar=True, logger=False)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: BCOModule) -> None:  # type: ignore[override]
        self._stop(trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: BCOModule, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if self._running_since is None:
            return
        device = trainer.strategy.root_device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)  # what was asked for is still being computed
        self._seconds += self._clock() - self._running_since
        self._running_since = None

    def _count(self, batch: FeedbackBatch, layout: str) -> None:
        padded = len(batch) * max(batch.lengths)
        self._rows += len(batch)
        self._tokens += batch.num_tokens
        self._positions += padded if layout == "padded" else batch.num_computed
        self._padding += padded - batch.num_tokens if layout == "padded" else 0
        if self._flops is not None:
            self._work += self._flops.of_batch(batch)

    def _values(self, trainer: Trainer, module: BCOModule) -> dict[str, float]:
        own = [self._seconds, self._tokens, self._rows, self._padding, self._positions, self._work]
        seconds, tokens, rows, padding, positions, work = sum_over_ranks([float(value) for value in own], trainer)
        seconds = max(seconds / trainer.world_size, 1e-9)
        device = trainer.strategy.root_device
        ceiling = matmul_ceiling(device, _computed_in(trainer, module)) * trainer.world_size
        return {
            "speed/tokens_per_second": tokens / seconds,
            "speed/rows_per_second": rows / seconds,
            "speed/padding_share": padding / positions,
            "speed/ceiling_share": work / seconds / ceiling,
            "speed/peak_memory_gib": max_over_ranks([peak_memory(device) / _GIB], trainer)[0],
        }


@lru_cache
def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, the best of what fits into 0.2 seconds.

    It is measured, once in a process, since data sheets know neither how many cores or watts a process may use nor
    what the installed libraries make of them.

    Args:
        device: Where.
        dtype: Data type of factors and product.

    Returns:
        A number above 0.
    """
    on_cpu = device.type == "cpu"
    size, repeats = (1024, 1) if on_cpu else (4096, 10)
    # Numbers at random, for hardware is faster on constant ones; by a generator of their own, for runs are repeatable.
    generator = torch.Generator(device).manual_seed(0)
    numbers = torch.randn(size, size, generator=generator, device=device).to(dtype)
    best, began = float("inf"), time.perf_counter()
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        torch.mm(numbers[:256, :256], numbers[:256, :256])
        while time.perf_counter() - began < _MEASURING_SECONDS:
            if not on_cpu:
                torch.accelerator.synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats):
                torch.mm(numbers, numbers)
            if not on_cpu:
                torch.accelerator.synchronize(device)
            best = min(best, (time.perf_counter() - start) / repeats)
    return 2 * size**3 / best


def _computed_in(trainer: Any, module: BCOModule) -> torch.dtype:
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(trainer.precision)
    return mixed or module.matmul_dtype


def peak_memory(device: torch.device) -> int:
    """The most memory that was in use at any time, in bytes.

    Args:
        device: On CUDA it is that of tensors there; elsewhere that of this process.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        # Unlike ru_maxrss it does not begin with what the process that started this one had.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        import resource

        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1024 if Path("/proc").exists() else 1)
