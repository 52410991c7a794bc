"""An optimizer's state in a checkpoint: by names of parameters, and checked before it reaches an optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from bco_lightning.errors import CheckpointError


def states_by_name(module: nn.Module, optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """The states of optimizers of a module, by the names of its parameters; the tensors are theirs, not copies."""
    return [dict(get_optimizer_state_dict(module, optimizer)) for optimizer in optimizers]


@torch.no_grad()
def restore_states(
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    states: Sequence[Mapping[str, Any]],
    *schedulers: LRSchedulerConfig,
) -> None:
    """Gives optimizers, before their first step, what :func:`states_by_name` has told.

    Weight decay is the run's own; so is a learning rate that a ``LambdaLR`` makes of its step.

    Each value goes into the tensor that the optimizer itself has made for it, so that it has the shape, data type,
    strides and device that the optimizer's kernels expect, whatever a checkpoint says; else it is refused.
    """
    if len(optimizers) != len(states):
        raise _other(f"{len(optimizers)} optimizers", f"{len(states)}")
    for optimizer, saved in zip(optimizers, states, strict=True):
        optimizer.zero_grad()
        own: Any = get_optimizer_state_dict(module, optimizer)  # makes one by a step without gradients
        names = [group["params"] for group in own["param_groups"]]
        found = [group["params"] for group in saved["param_groups"]]
        unknown = saved["state"].keys() - own["state"].keys()
        if list(map(set, names)) != list(map(set, found)) or unknown:
            raise _other(f"the state of {sum(map(len, names))} parameters", "that of others")
        pairs = zip(own["param_groups"], saved["param_groups"], strict=True)
        groups = [{**group, "lr": _rate({**group, **theirs})} for group, theirs in pairs]
        filled = {  # a parameter that never had a gradient has no state
            name: _filled(value, saved["state"][name], name)
            for name, value in own["state"].items()
            if name in saved["state"]
        }
        optimizer.load_state_dict({"state": filled, "param_groups": groups})
    for scheduler in (config.scheduler for config in schedulers):
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
            for group, share in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * share(scheduler.last_epoch)


def _rate(group: Mapping[str, Any]) -> float:
    rate = group["lr"]
    if type(rate) not in (int, float) or not math.isfinite(rate) or rate < 0:
        raise _other("a finite number as lr", "another")
    return float(rate)


def _filled(own: Any, found: Any, where: str) -> Any:
    if isinstance(own, Tensor):
        if not isinstance(found, Tensor) or (found.shape, found.dtype) != (own.shape, own.dtype):
            raise _other(f"{where} of shape {_described(own)}", _described(found))
        return own.copy_(found)
    if isinstance(own, Mapping):
        if not isinstance(found, Mapping) or found.keys() != own.keys():
            raise _other(f"{', '.join(map(str, own))} of {where}", "others")
        return {key: _filled(value, found[key], f"{key} of {where}") for key, value in own.items()}
    if type(found) is not type(own):
        raise _other(f"{where} as {_described(own)}", _described(found))
    return found


def _described(value: Any) -> str:
    return f"{tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _other(expected: str, found: str) -> CheckpointError:
    problem = f"expected {expected}, found {found}."
    remedy = "Use the same model.optimizer, model.name_or_path and model.lora as the run that wrote it."
    return CheckpointError("checkpoint", problem, remedy)
