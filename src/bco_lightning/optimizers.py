"""AdamW in its variants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from bco_lightning.models.refusals import require_bitsandbytes
from bco_lightning.options import OptimizerName

_FUSED = {"cpu", "cuda", "mps", "xpu"}


def make_optimizer(name: OptimizerName, parameters: Sequence[nn.Parameter], **options: Any) -> Optimizer:
    """An optimizer of what is trained.

    Args:
        name: ``adamw`` updates all weights in one pass; ``adamw_8bit`` keeps its moments in eight bits, a quarter of
            the memory; ``paged_adamw_8bit`` also lets them move to host memory, under CUDA.
        parameters: Float32 or bfloat16 parameters.
        options: Learning rate and weight decay.

    Returns:
        The optimizer.

    Raises:
        ConfigError: If its library is not installed.
    """
    if name == "adamw":
        optimizer = AdamW(parameters, fused=all(p.device.type in _FUSED for p in parameters), **options)
        # Left to itself, a fused optimizer takes the scaling of float16 gradients upon itself, so that Lightning
        # refuses to clip them under any mixed precision.
        optimizer._step_supports_amp_scaling = False
        return optimizer
    require_bitsandbytes("model.optimizer", name)
    import bitsandbytes

    kinds = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kinds[name](parameters, **options)  # type: ignore[no-any-return]
