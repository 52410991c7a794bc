"""The table of docs/many_gpus.md: what 8B, 70B and 405B take of each of 8 to 1024 GPUs, by the formula of ``plan``."""

from __future__ import annotations

from itertools import product

from bco_lightning.models.load import NAMED_SHAPES
from bco_lightning.models.memory import PlanOptions, memory_of


def scale_table(gpu_memory: float = 80.0) -> str:
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
            shown = " | ".join(f"{size / 2**30:,.2f}" if size else "" for size in sizes)
            fits = "fits" if total <= gpu_memory * 2**30 else "**no**"
            lines.append(f"| {name} | {f'LoRA, rank {rank}' if rank else 'full'} | {gpus} | {shown} | {fits} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(scale_table())
