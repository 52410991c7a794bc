"""What an epoch takes: tokens, optimizer steps, and a rough range of hours on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.benchmark import Timer

from bco_lightning.errors import UserError
from bco_lightning.inspection.numbers import RowArrays
from bco_lightning.models.load import locate_model, resolve_dtype, unloaded_model
from bco_lightning.models.useful_flops import UsefulFlops
from bco_lightning.options import ModelOptions

# Shares of the speed of a large matrix product that training reaches: small models and short rows are near the lower
# end. The reference's pass is not in the useful operations and is paid out of this share too.
EFFICIENCY = (0.15, 0.6)


@dataclass(frozen=True)
class Cost:
    """What a run takes, and why there is no time if there is none."""

    tokens: float  # of an epoch, after cutting; rows drawn again count again
    completion_tokens: float  # those of them that carry loss
    rows_per_step: int  # over all devices and accumulated micro-batches
    steps_per_epoch: int
    steps: int | None  # of the run, if it has an end
    flops: float | None = None  # useful ones, of an epoch
    seconds: tuple[float, float] | None = None  # least and most, of the run, or of an epoch if it has no end
    machine: str = ""
    why_not: str = ""

    @property
    def duration(self) -> str:
        """The time that it takes, for people, such as ``1.3 to 19 min``."""
        if self.seconds is None:
            return "not known"
        sizes, (least, most) = ((86400.0, "days"), (3600.0, "h"), (60.0, "min")), self.seconds
        size, unit = next(((size, unit) for size, unit in sizes if most >= size), (1.0, "s"))
        shown = (f"{seconds / size:,.{1 if seconds < 10 * size else 0}f}" for seconds in (least, most))
        return f"{' to '.join(shown)} {unit}"


def cost_of(
    arrays: RowArrays,
    share_up: float,
    model: ModelOptions,
    trainer: Mapping[str, Any],
    batch_size: int,
    micro_batches_per_epoch: int,
) -> Cost:
    """What a run with such rows and arguments of the trainer takes, by the speed of matrix products here.

    ``share_up`` is that of thumbs-up among the rows that are drawn; micro-batches of an epoch are as if there were one
    device and no accumulation.
    """
    device, devices = _devices(trainer)
    accumulation = trainer.get("accumulate_grad_batches")
    per_step = devices * (accumulation if isinstance(accumulation, int) else 1)
    steps_per_epoch = -(-micro_batches_per_epoch // per_step)
    rows = steps_per_epoch * per_step * batch_size
    classes = ((arrays.thumbs_up, share_up), (~arrays.thumbs_up, 1 - share_up))
    tokens, completion_tokens, squared_lengths = (
        rows * sum(share * float(values[of].mean()) for of, share in classes if of.any())
        for values in (arrays.lengths, arrays.loss_tokens, arrays.lengths.astype(float) ** 2)
    )
    steps = num_steps(trainer, steps_per_epoch)
    cost = Cost(tokens, completion_tokens, per_step * batch_size, steps_per_epoch, steps)
    try:
        # What the tokenizer was loaded from: transformers reads all of a GGUF file to find its shape.
        folder = locate_model(model.name_or_path).folder(model.cache_folder)
        useful = UsefulFlops.of(unloaded_model(folder, model.lora))
    except UserError as error:
        return replace(cost, why_not=f"the model's operations cannot be counted ({error.problem.rstrip('.')})")
    flops = (
        useful.per_token * tokens
        + useful.per_completion_token * completion_tokens
        + useful.per_squared_length * squared_lengths
    )
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(trainer.get("precision")))
    rate = devices * _matmul_rate(device, mixed or resolve_dtype(model.dtype, model.lora, device))
    epochs = steps / steps_per_epoch if steps is not None else 1.0
    seconds = (epochs * flops / rate / EFFICIENCY[1], epochs * flops / rate / EFFICIENCY[0])
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else f"this CPU (threads: {torch.get_num_threads()})"
    return replace(cost, flops=flops, seconds=seconds, machine=f"{devices} × {name}" if devices > 1 else name)


def num_steps(trainer: Mapping[str, Any], steps_per_epoch: int) -> int | None:
    """Optimizer steps of a run by ``trainer.max_epochs`` and ``trainer.max_steps``; ``None`` if it has no end."""
    epochs, limit = trainer.get("max_epochs"), trainer.get("max_steps")
    ends = [limit] if isinstance(limit, int) and limit >= 0 else []
    if isinstance(epochs, int) and epochs >= 0:
        ends.append(epochs * steps_per_epoch)
    return min(ends, default=None)


def _devices(trainer: Mapping[str, Any]) -> tuple[torch.device, int]:
    """One device of a run, and how many there are, as far as plain numbers and this machine say."""
    on_cuda = torch.cuda.is_available() and trainer.get("accelerator") in ("auto", "gpu", "cuda", None)
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes")
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if isinstance(devices, (list, tuple)):
        devices = len(devices)
    if not isinstance(devices, int) or devices < 1:
        devices = torch.cuda.device_count() if on_cuda else 1
    return torch.device("cuda:0" if on_cuda else "cpu"), devices * (nodes if isinstance(nodes, int) else 1)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large matrix product, within 0.2 seconds."""
    size = 1024 if device.type == "cpu" else 4096
    numbers = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    timer = Timer("numbers @ numbers", globals={"numbers": numbers}, num_threads=torch.get_num_threads())
    return float(2 * size**3 / timer.blocked_autorange(min_run_time=0.2).median)
