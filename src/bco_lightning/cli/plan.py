"""``plan``: whether a model fits into the memory of so many GPUs, before anything is loaded."""

from __future__ import annotations

from itertools import product
from typing import Any

from rich.console import Console

from bco_lightning.importance.report import text_table
from bco_lightning.models.load import NAMED_SHAPES
from bco_lightning.models.memory import SHARE_TAKEN, PlanOptions, memory_of, tokens_within

GIB = 2**30
LEFT_OUT = "Not counted: the CUDA context (0.5 to 1 GiB), buffers of NCCL and cuBLAS, and fragmentation."


def plan_command(table: bool = False, **options: Any) -> None:
    """Prints the memory of one GPU by part, or, as ``table``, that of published models by number of GPUs."""
    given = PlanOptions(**options)
    if table:
        print(scale_table(given.gpu_memory))
        return
    memory = {part: size / GIB for part, size in memory_of(given).items() if size}
    total = sum(memory.values())
    kind = f"LoRA of rank {given.lora_r}" if given.lora_r else "full fine-tuning"
    rows = ((part, f"{size:,.2f}") for part, size in {**memory, "peak": total}.items())
    shown = text_table(f"{given.model}, {kind}, {given.strategy}, GPUs: {given.gpus}", "", "GiB of one GPU", rows=rows)
    fits = "fits into" if total <= given.gpu_memory else "DOES NOT FIT into"
    Console().print(shown)
    Console().print(f"{total:,.2f} GiB at the peak: {fits} {given.gpu_memory:g} GiB. {LEFT_OUT}", highlight=False)
    tokens = tokens_within(SHARE_TAKEN * given.gpu_memory * GIB, given)
    Console().print(f"Tokens that {SHARE_TAKEN:.0%} of it hold (data.tokens_per_micro_batch: auto): {tokens:,}")


def scale_table(gpu_memory: float) -> str:
    """Plans of the published Llama 3.1 shapes from 8 to 1024 GPUs, with gradient checkpointing, in markdown."""
    parts = ("weights", "gradients", "optimizer", "gathered weights", "gradients in transit", "activations")
    lines = [
        f"| model | trained | GPUs | {' | '.join(parts)} | other | total | {gpu_memory:g} GiB |",
        f"|---|---|{'--:|' * (len(parts) + 3)}---|",
    ]
    for name, rank in product(NAMED_SHAPES, (0, 16)):
        for gpus in (8, 64, 256, 1024):
            memory = memory_of(PlanOptions(name, gpus, lora_r=rank, gradient_checkpointing=True))
            total = sum(memory.values())
            named = [memory.get(part, 0) for part in parts]
            sizes = [*named, total - sum(named), total]
            shown = " | ".join(f"{size / GIB:,.2f}" if size else "" for size in sizes)
            fits = "fits" if total <= gpu_memory * GIB else "**no**"
            lines.append(f"| {name} | {f'LoRA, rank {rank}' if rank else 'full'} | {gpus} | {shown} | {fits} |")
    return "\n".join(lines)
