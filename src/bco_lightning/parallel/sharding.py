"""What FSDP2 cuts up, and how the parts compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor

from bco_lightning.errors import ConfigError


@dataclass(frozen=True)
class Sharding:
    """How models are cut up over processes, by a mesh of ``parts``, or of ``copies`` that are each cut into parts.

    Decoder layers are gathered in ``compute_dtype``, gradients being reduced in float32; as they are if left out. The
    states that pass from layer to layer stay as they are under autocast.
    """

    mesh: Any
    compute_dtype: torch.dtype | None = None
    cpu_offload: bool = False


def sharding_of(trainer: Any) -> Sharding | None:
    """How the trainer's strategy cuts up models; ``None`` where each process has whole ones."""
    return getattr(trainer.strategy, "sharding", None)


def copies_of_parameters(trainer: Any) -> int:
    """In how many processes each part of a parameter is, and so how often a sum over processes counts it."""
    if (sharding := sharding_of(trainer)) is None:
        return int(trainer.world_size)
    return int(sharding.mesh.size(0)) if sharding.mesh.ndim > 1 else 1


def shard(causal_lm: Any, layers: Iterable[nn.Module], sharding: Sharding, apart: Iterable[nn.Module] = ()) -> None:
    """Cuts up a language model, its weights perhaps mapped from files, in place: each decoder layer, and the rest.

    No more than one of these units is whole, and in its final data type, at a time; embedding and head, which are
    large, take theirs in parts. ``layers`` are for a model that does not name the classes of what is not to be split.
    What is ``apart`` is no unit: a step may ask for it in some processes alone, and all have to gather the same.
    """
    named = set(causal_lm._no_split_modules or ())
    inner = {module for part in apart for module in part.modules()}
    units = [each for each in causal_lm.modules() if type(each).__name__ in named and each not in inner] or list(layers)
    if not units:
        problem = f"expected a model with a list of layers, found {type(causal_lm).__name__}."
        raise ConfigError("trainer.strategy", problem, "Use ddp.")
    ends = (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    later = {end: final_dtype(end.weight) for end in ends if type(end) in (nn.Embedding, nn.Linear)}  # if not adapted
    pinned = fsdp.CPUOffloadPolicy(pin_memory=sharding.mesh.device_type != "cpu")
    offload = pinned if sharding.cpu_offload else fsdp.OffloadPolicy()
    done: set[nn.Module] = set()
    for unit in [*reversed(units), causal_lm]:  # the inner before the outer
        own = [module for module in unit.modules() if module not in done]
        done.update(own)
        for module in own:
            for parameter in module.parameters(recurse=False) if module not in later else ():
                take_final_dtype(parameter)
        dtype = sharding.compute_dtype if unit is not causal_lm else None
        precision = fsdp.MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False)
        fsdp.fully_shard(unit, mesh=sharding.mesh, mp_policy=precision, offload_policy=offload)
    for module, dtype in later.items():
        module.to(dtype)
    # Functions of the model enter it by a side door; FSDP2 gathers weights for the doors it knows.
    causal_lm._call_with = MethodType(lambda causal_lm, function: function(causal_lm), causal_lm)
    fsdp.register_fsdp_forward_method(causal_lm, "_call_with")


def is_sharded(model: Any) -> bool:
    """Whether :func:`shard` was called on a model, perhaps with PEFT around it."""
    return isinstance(model.get_base_model() if hasattr(model, "get_base_model") else model, fsdp.FSDPModule)


def run_gathered(causal_lm: Any, function: Callable[[Any], Any]) -> Any:
    """``function(causal_lm)``, with the weights of a sharded model gathered as they are needed."""
    if not is_sharded(causal_lm):
        return function(causal_lm)
    found = causal_lm._call_with(function)
    if not torch.is_grad_enabled():
        causal_lm.reshard()  # FSDP2 leaves what is outside of layers to a backward pass, which does not come
    return found


def final_dtype(parameter: Tensor) -> torch.dtype:
    """The data type that a parameter has, or is to have once it is cut up."""
    return getattr(parameter, "final_dtype", parameter.dtype)


def take_final_dtype(parameter: nn.Parameter) -> None:
    """Casts a parameter of a mapped model, in place."""
    parameter.data = parameter.data.to(final_dtype(parameter))


def own_part(value: Any) -> Any:
    """What this process has of a sharded tensor; anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes; its weights may be elsewhere, where processes keep their parts in the CPU's memory."""
    weight: Any = next(model.parameters())
    return torch.empty(0, device=weight.device_mesh.device_type).device if is_cut(weight) else weight.device


def is_cut(value: Any) -> bool:
    """Whether a tensor is spread over processes."""
    return isinstance(value, DTensor)
