"""``plan``: whether a model fits into the memory of so many GPUs, before anything is loaded."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from bco_lightning.importance.report import text_table
from bco_lightning.models.memory import SHARE_TAKEN, PlanOptions, memory_of, tokens_within

GIB = 2**30
LEFT_OUT = "Not counted: the CUDA context (0.5 to 1 GiB), buffers of NCCL and cuBLAS, and fragmentation."


def plan_command(**options: Any) -> None:
    """Prints the memory of one GPU by part."""
    given = PlanOptions(**options)
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
