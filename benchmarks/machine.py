"""What the machine is and how fast it multiplies matrices, and how much of that a training step can use."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

THREADS = 2
BUSY = 1.0  # load average above which figures are noise
SQUARES = {"2048 cubed": (2048, 2048, 2048), "4096 cubed": (4096, 4096, 4096)}
MODEL_SHAPES = {
    "attention 1024x576x576": (1024, 576, 576),
    "mlp up 1024x576x1536": (1024, 576, 1536),
    "mlp down 1024x1536x576": (1024, 1536, 576),
    "head 256x576x49152": (256, 576, 49152),
    "head backward 256x49152x576": (256, 49152, 576),
}


def describe() -> dict[str, Any]:
    """Cores, instruction sets, memory and versions; nothing that names the machine."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = told.get("flags", "").split()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "cpu": told.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "flags": [flag for flag in flags if flag.startswith(("amx", "avx512_bf16", "avx2", "avx512f"))],
        "memory_gib": round(pages / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def load() -> float:
    """Load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def matmul_ceiling(dtypes: Sequence[str] = ("float32", "bfloat16"), repeats: int = 8) -> dict[str, dict[str, float]]:
    """Best GFLOP/s of matrix products.

    Args:
        dtypes: Names of data types. Without AVX-512 or AMX, products in bfloat16 take minutes.
        repeats: Products of each shape; the fastest counts. No more after the first 10 seconds of a shape.

    Returns:
        For each data type the rate of each shape, and as ``ceiling`` the best square one. Small operands that stay in
        the cache (the body's shapes) can be faster than that, the head's are slower.
    """
    import torch

    torch.set_num_threads(THREADS)
    rates: dict[str, dict[str, float]] = {}
    for name in dtypes:
        dtype, rates[name] = getattr(torch, name), {}
        for shape, (rows, inner, columns) in (SQUARES | MODEL_SHAPES).items():
            a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
            out = torch.empty(rows, columns, dtype=dtype)
            seconds: list[float] = []
            while len(seconds) < repeats and sum(seconds) < 10:
                start = time.perf_counter()
                torch.mm(a, b, out=out)
                seconds.append(time.perf_counter() - start)
            rates[name][shape] = round(2 * rows * inner * columns / min(seconds) / 1e9, 1)
        rates[name]["ceiling"] = max(rates[name][shape] for shape in SQUARES)
    return rates


def useful_flops(config: dict[str, Any], rows: list[tuple[int, int, int]], lora: bool) -> float:
    """Floating-point operations that one step cannot do without.

    A matrix product of the body counts 6 operations per parameter and token, forward and backward (4 where the weight
    is frozen, and has no gradient), one of the head the same per completion token, attention its causal half, and each
    prompt of the step once. The reference, anything computed twice, padding, adapters and the head over the prompt
    count nothing.

    Args:
        config: The model's ``body_parameters``, ``hidden_size``, ``vocab_size``, ``num_layers``, ``attention_size``.
        rows: Of each row its tokens, its completion tokens, and how many at its start an earlier row has in common.
        lora: Whether only adapters are trained.
    """
    passes = 2 if lora else 3
    body = 2 * config["body_parameters"] * sum(tokens - common for tokens, _, common in rows)
    head = 2 * config["hidden_size"] * config["vocab_size"] * sum(completion for _, completion, _ in rows)
    attended = sum(tokens**2 - common**2 for tokens, _, common in rows)
    attention = 2 * config["attention_size"] * config["num_layers"] * attended
    # The backward pass of attention has no weights that could be frozen.
    return float(passes * (body + head) + 3 * attention)
