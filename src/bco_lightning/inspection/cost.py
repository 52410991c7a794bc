"""What an epoch takes: tokens, optimizer steps, and a rough range of hours on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from bco_lightning.errors import UserError
from bco_lightning.metrics import Array
from bco_lightning.models.load import resolve_dtype
from bco_lightning.models.unloaded import unloaded_model
from bco_lightning.models.useful_flops import UsefulFlops
from bco_lightning.options import LoraSettings

# Shares of the speed of a large matrix product that training reaches: small models and short rows are near the lower
# end. The reference's pass is not in the useful operations and is paid out of this share too.
EFFICIENCY = (0.15, 0.6)
_MEASURING_SECONDS = 0.2


@dataclass(frozen=True)
class Machine:
    """Where a run would take place.

    Args:
        device: One device.
        name: For people.
        num_devices: Processes of the run, over all nodes.
        dtype: What matrices are multiplied in.
    """

    device: torch.device
    name: str
    num_devices: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Work:
    """What there is to compute in one epoch.

    Args:
        rows: Rows that an epoch draws, those drawn again included.
        tokens: Tokens of these rows, prompt and completion, after cutting.
        completion_tokens: Those of them that carry loss.
        squared_lengths: Sum of the squared lengths of these rows, which attention grows with.
    """

    rows: int
    tokens: float
    completion_tokens: float
    squared_lengths: float

    def flops(self, useful: UsefulFlops) -> float:
        """Floating-point operations that an epoch cannot do without."""
        return (
            useful.per_token * self.tokens
            + useful.per_completion_token * self.completion_tokens
            + useful.per_squared_length * self.squared_lengths
        )


@dataclass(frozen=True)
class Cost:
    """What a run takes.

    Args:
        work: Of one epoch.
        rows_per_step: Rows of an optimizer step, over all devices and accumulated micro-batches.
        steps_per_epoch: Optimizer steps of an epoch.
        steps: Optimizer steps of the run; ``None`` where the config sets no end.
        flops: Useful operations of an epoch; ``None`` where the model's shape is not known.
        seconds: Least and most seconds of the run, or of one epoch where it has no end; ``None`` where not known.
        machine: Where, in words.
        why_not: Why there is no time.
    """

    work: Work
    rows_per_step: int
    steps_per_epoch: int
    steps: int | None
    flops: float | None = None
    seconds: tuple[float, float] | None = None
    machine: str = ""
    why_not: str = ""


def work_of_epoch(lengths: Array, loss_tokens: Array, thumbs_up: Array, share_up: float, rows: int) -> Work:
    """Expected work of an epoch.

    Args:
        lengths: Tokens of each row of the data set, after cutting.
        loss_tokens: Those of them that carry loss.
        thumbs_up: The thumb of each row.
        share_up: Share of thumbs-up among the rows that are drawn, 0 to 1.
        rows: Rows that are drawn in an epoch.

    Returns:
        The work; where all rows are drawn once it is their sum.

    Example:
        >>> import numpy as np
        >>> up = np.array([True, False])
        >>> work_of_epoch(np.array([4, 6]), np.array([1, 2]), up, share_up=0.5, rows=2)
        Work(rows=2, tokens=10.0, completion_tokens=3.0, squared_lengths=52.0)
    """
    shares = ((thumbs_up, share_up), (~thumbs_up, 1 - share_up))
    sizes = (lengths.astype(float), loss_tokens.astype(float), lengths.astype(float) ** 2)
    means = [sum(share * float(size[chosen].mean()) for chosen, share in shares if chosen.any()) for size in sizes]
    return Work(rows, *(rows * mean for mean in means))


def machine_of(trainer: Mapping[str, Any], dtype: str, lora: LoraSettings | None) -> Machine:
    """The devices that a config asks for, as far as plain numbers and this machine say.

    Args:
        trainer: The options ``accelerator``, ``devices``, ``num_nodes`` and ``precision``.
        dtype: ``model.dtype``.
        lora: Adapter settings, or ``None`` for full fine-tuning.

    Returns:
        A CUDA device if there is one and it is not declined, else the CPU.
    """
    on_cuda = torch.cuda.is_available() and trainer.get("accelerator") in ("auto", "gpu", "cuda", None)
    device = torch.device("cuda:0" if on_cuda else "cpu")
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(trainer.get("precision")))
    nodes = trainer.get("num_nodes")
    return Machine(
        device,
        torch.cuda.get_device_name(device) if on_cuda else f"this CPU ({torch.get_num_threads()} threads)",
        _num_devices(trainer.get("devices"), on_cuda) * (nodes if isinstance(nodes, int) else 1),
        mixed or resolve_dtype(dtype, lora, device),  # type: ignore[arg-type]
    )


def _num_devices(devices: Any, on_cuda: bool) -> int:
    if isinstance(devices, (list, tuple)):
        return max(1, len(devices))
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, int) and devices > 0:
        return devices
    return torch.cuda.device_count() if on_cuda else 1


def cost_of(
    work: Work, model: str, lora: LoraSettings | None, machine: Machine, *, rows_per_step: int, steps_per_epoch: int,
    steps: int | None,
) -> Cost:  # fmt: skip
    """What a run takes, with a rough time by the speed that matrix products have here.

    Args:
        work: Of one epoch.
        model: ``model.name_or_path``.
        lora: Adapter settings, or ``None`` for full fine-tuning.
        machine: Where.
        rows_per_step: Rows of an optimizer step.
        steps_per_epoch: Optimizer steps of an epoch.
        steps: Optimizer steps of the run, if it has an end.

    Returns:
        The cost, with the reason where there is no time.
    """
    cost = Cost(work, rows_per_step, steps_per_epoch, steps)
    try:
        flops = work.flops(UsefulFlops.of(unloaded_model(model, lora)))
    except UserError as error:
        return replace(cost, why_not=f"the model's operations cannot be counted ({error.problem.rstrip('.')})")
    rate = matmul_ceiling(machine.device, machine.dtype) * machine.num_devices
    epochs = steps / steps_per_epoch if steps is not None else 1.0
    least, most = (epochs * flops / rate / share for share in reversed(EFFICIENCY))
    times = f"{machine.num_devices} × " if machine.num_devices > 1 else ""
    return replace(cost, flops=flops, seconds=(least, most), machine=f"{times}{machine.name}")


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


def num_steps(trainer: Mapping[str, Any], steps_per_epoch: int) -> int | None:
    """Optimizer steps of a run by ``trainer.max_epochs`` and ``trainer.max_steps``; ``None`` if it has no end.

    Example:
        >>> num_steps({"max_epochs": 3, "max_steps": -1}, 10), num_steps({"max_epochs": 3, "max_steps": 7}, 10)
        (30, 7)
    """
    epochs, limit = trainer.get("max_epochs"), trainer.get("max_steps")
    ends = [limit] if isinstance(limit, int) and limit >= 0 else []
    if isinstance(epochs, int) and epochs >= 0:
        ends.append(epochs * steps_per_epoch)
    return min(ends, default=None)
