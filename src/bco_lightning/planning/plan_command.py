"""``python -m bco_lightning plan``: what a run would take of each GPU's memory, before it is started."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import get_args

from rich.console import Console
from rich.table import Table

from bco_lightning.errors import ConfigError
from bco_lightning.planning.memory_plan import (
    GIB,
    MemoryPlan,
    MemorySettings,
    PlannedDtype,
    PlannedOptimizer,
    PlannedPrecision,
    PlannedReference,
    Strategy,
    plan_memory,
)
from bco_lightning.planning.model_shape import NAMED_SHAPES, shape_of

LEFT_OUT = "Not counted: the CUDA context (0.5 to 1 GiB), buffers of NCCL and cuBLAS, and fragmentation."


def plan_command(arguments: Sequence[str]) -> None:
    """Prints the memory of one GPU by part, or a table of models by number of GPUs.

    Args:
        arguments: What comes after ``plan``.

    Raises:
        ConfigError: If an option is out of range, or no model is named.
    """
    options = _parser().parse_args(arguments)
    if options.gpu_memory <= 0:
        raise ConfigError("--gpu_memory", f"expected GiB above 0, found {options.gpu_memory:g}.")
    if options.table:
        print(scale_table(options.gpu_memory))
        return
    if options.model is None:
        raise ConfigError("--model", "expected a model, found none.", f"Give {', '.join(NAMED_SHAPES)}, or a name.")
    if options.completion_tokens is None:
        options.completion_tokens = max(1, options.max_length // 4)
    settings = MemorySettings(
        **{field.name: getattr(options, field.name) for field in fields(MemorySettings) if hasattr(options, field.name)}
    )
    shape = shape_of(options.model)
    plan = plan_memory(shape, settings)
    console = Console()
    console.print(plan_table(options.model, settings, plan))
    adapters = f", {shape.num_adapter_parameters(settings.lora_r):,} of adapters" if settings.lora_r else ""
    console.print(f"{shape.num_parameters:,} parameters{adapters}.", highlight=False)
    fits = plan.fits(options.gpu_memory)
    console.print(verdict(plan, options.gpu_memory), style="green" if fits else "bold red", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bco_lightning plan",
        description="Work out what a run would take of each GPU's memory. No weight is loaded.",
        allow_abbrev=False,
    )
    defaults = MemorySettings()
    parser.add_argument(
        "--model",
        help="8B, 70B or 405B (shapes of Llama 3.1), or a hub id, a folder, a .gguf file or package:NAME",
    )
    parser.add_argument("--gpus", type=int, default=defaults.gpus, help="GPUs in all (default: %(default)s)")
    for option, choices, said in (
        ("strategy", Strategy, "how models are spread over GPUs"),
        ("dtype", PlannedDtype, "weights; auto is float32 for full fine-tuning, bfloat16 for LoRA"),
        ("precision", PlannedPrecision, "auto is bf16-mixed for full fine-tuning, 32-true for LoRA"),
        ("optimizer", PlannedOptimizer, "AdamW, or with moments of eight bits"),
        ("reference", PlannedReference, "none where its log-probs are cached or adapters are switched off"),
    ):
        default = getattr(defaults, option)
        parser.add_argument(
            f"--{option}", choices=get_args(choices), default=default, help=f"{said} (default: %(default)s)"
        )
    for option, said in (
        ("lora_r", "rank of the adapters; 0 trains all weights"),
        ("batch_size", "rows of a micro-batch on one GPU"),
        ("max_length", "tokens of each row, prompt and completion"),
    ):
        parser.add_argument(
            f"--{option}", type=int, default=getattr(defaults, option), help=f"{said} (default: %(default)s)"
        )
    parser.add_argument(
        "--completion_tokens", type=int, help="tokens of each row that carry loss (default: a quarter of max_length)"
    )
    parser.add_argument("--gradient_checkpointing", action="store_true", help="compute activations again")
    parser.add_argument("--cpu_offload", action="store_true", help="keep weights, gradients and moments in host memory")
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="GiB of one GPU (default: %(default)s)")
    parser.add_argument(
        "--table", action="store_true", help="print 8B, 70B and 405B on 8 to 1024 GPUs as markdown, and nothing else"
    )
    return parser


def plan_table(name: str, settings: MemorySettings, plan: MemoryPlan) -> Table:
    """A plan as a table: the parts at the peak, and what is alive at other moments.

    Args:
        name: The model.
        settings: How it is trained.
        plan: What it takes.

    Returns:
        A rich table, in GiB.
    """
    kind = f"LoRA of rank {settings.lora_r}" if settings.lora_r else "full fine-tuning"
    table = Table(title=f"{name}, {kind}, {settings.strategy}, GPUs: {settings.gpus}")
    table.add_column("")
    table.add_column("GiB of one GPU", justify="right")
    for part, value in plan.parts().items():
        if value:
            table.add_row(part, _gib(value))
    table.add_section()
    table.add_row(f"peak ({plan.peak.name})", _gib(plan.total), style="bold")
    table.add_section()
    for moment in plan.moments:
        if moment.total and moment is not plan.peak:
            table.add_row(moment.name, _gib(plan.resident + moment.total))
    return table


def verdict(plan: MemoryPlan, gpu_memory: float) -> str:
    """One sentence: how much the plan takes, and whether it fits."""
    fits = "fits into" if plan.fits(gpu_memory) else "DOES NOT FIT into"
    host = f" {_gib(plan.host)} GiB of host memory for each process." if plan.host else ""
    return f"{_gib(plan.total)} GiB at the peak ({plan.peak.name}): {fits} {gpu_memory:g} GiB.{host} {LEFT_OUT}"


def scale_table(gpu_memory: float) -> str:
    """Plans of the published Llama 3.1 shapes from 8 to 1024 GPUs, as a markdown table.

    Args:
        gpu_memory: GiB of one GPU.

    Returns:
        Lines of markdown: a table, and what does not fit.
    """
    parts = ("weights", "gradients", "optimizer", "gathered weights", "gradients in transit", "activations")
    lines = [
        f"| model | trained | GPUs | {' | '.join(parts)} | other | total | {gpu_memory:g} GiB |",
        f"|---|---|{'--:|' * (len(parts) + 3)}---|",
    ]
    too_large: dict[str, list[int]] = {}
    for name in NAMED_SHAPES:
        shape = shape_of(name)
        for kind, rank in (("full", 0), ("LoRA, rank 16", 16)):
            for gpus in (8, 64, 256, 1024):
                plan = plan_memory(shape, MemorySettings(gpus=gpus, lora_r=rank, gradient_checkpointing=True))
                known = plan.parts()
                row = [_gib(known[part]) for part in parts]
                row += [_gib(plan.total - sum(known[part] for part in parts)), _gib(plan.total)]
                fits = plan.fits(gpu_memory)
                lines.append(f"| {name} | {kind} | {gpus} | {' | '.join(row)} | {'fits' if fits else '**no**'} |")
                if not fits:
                    too_large.setdefault(f"{name} {kind}", []).append(gpus)
    said = "; ".join(f"{what} on {', '.join(map(str, numbers))} GPUs" for what, numbers in too_large.items())
    lines += ["", f"GiB of one GPU. Does not fit into {gpu_memory:g} GiB: {said or 'none'}."]
    return "\n".join(lines)


def _gib(value: int) -> str:
    return f"{value / GIB:,.2f}" if value else ""
