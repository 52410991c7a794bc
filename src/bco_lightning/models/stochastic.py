"""AdamW that keeps nothing but bfloat16, and rounds at random so that no small update is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bco_lightning.parallel.sharding import own_part

_AT_ONCE = 2**24  # elements that are in float32 at a time


class StochasticAdamW(Optimizer):
    """AdamW in float32 whose weights and moments are rounded to bfloat16 up or down, right in expectation.

    Rounded to the nearest number, a weight of bfloat16 keeps nothing of an update below a 512th of it. What is drawn
    follows from the seed, the step and the parameter's number: a run that goes on draws the same, and so does every
    process that has the same part of a parameter.

    Source:
        Croci et al. 2022, "Stochastic rounding: implementation, error analysis and applications", section 2.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, seed: int) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates what has a gradient."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._update(parameter, number, group)
        return loss

    def _update(self, parameter: Any, number: int, group: dict[str, Any]) -> None:
        lr, weight_decay, betas, eps = (group[name] for name in ("lr", "weight_decay", "betas", "eps"))
        if not (state := self.state[parameter]):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            state.update(step=torch.zeros(()), **moments)
        state["step"] += 1
        step = int(state["step"])
        drawn = torch.Generator(parameter.device).manual_seed(hash((self._seed, step, number)) % 2**63)
        kept = (parameter, parameter.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"])
        for weight, grad, mean, square in zip(*(own_part(each).view(-1).split(_AT_ONCE) for each in kept), strict=True):
            new_mean = mean.float().lerp_(grad.float(), 1 - betas[0])
            new_square = square.float().lerp_(grad.float().square(), 1 - betas[1])
            size = (new_square / (1 - betas[1] ** step)).sqrt_().add_(eps)
            new_weight = weight.float().mul_(1 - lr * weight_decay)
            new_weight.addcdiv_(new_mean, size, value=-lr / (1 - betas[0] ** step))
            for place, exact in ((weight, new_weight), (mean, new_mean), (square, new_square)):
                place.copy_(_rounded(exact, drawn) if place.dtype == torch.bfloat16 else exact)


def _rounded(exact: Tensor, drawn: torch.Generator) -> Tensor:
    """Bfloat16 is the upper half of float32; whether the lower one carries is drawn."""
    half = torch.randint(2**16, exact.shape, generator=drawn, device=exact.device, dtype=torch.int32)
    return half.add_(exact.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
