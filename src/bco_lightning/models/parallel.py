"""The only file that knows what FSDP cuts up, and how a model's parts become whole again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffload,
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from bco_lightning.errors import ConfigError
from bco_lightning.models.layout import RUN_GATHERED, causal_lm_of, decoder_layers_of
from bco_lightning.models.load import final_dtype, take_final_dtype

_WRAPPED = "_fsdp_wrapped_module."


@dataclass(frozen=True)
class Sharding:
    """How models are cut up over processes.

    Args:
        engine: ``fsdp`` is FSDP1, ``fsdp2`` is ``fully_shard``.
        mesh: Device mesh of one dimension; of two, ``(copies, parts)``, for weights that are cut up over some of the
            processes only.
        compute_dtype: What decoder layers are gathered in, gradients being reduced in float32; as they are if left
            out. The states that pass from layer to layer stay as they are under autocast.
        cpu_offload: Keep parts and moments in host memory.
    """

    engine: Literal["fsdp", "fsdp2"]
    mesh: Any
    compute_dtype: torch.dtype | None = None
    cpu_offload: bool = False


def make_mesh(device_type: str, processes: int, group: int | None = None) -> Any:
    """The mesh of all processes; with ``group``, copies of the weights that are each cut up over so many."""
    if group is None or group == processes:
        return init_device_mesh(device_type, (processes,), mesh_dim_names=("parts",))
    return init_device_mesh(device_type, (processes // group, group), mesh_dim_names=("copies", "parts"))


def shard(model: nn.Module, sharding: Sharding, prepare: Callable[[Iterable[nn.Module]], object]) -> None:
    """Cuts up a language model in place: each decoder layer for itself, and what is left of it.

    No more than one of these units is whole, and in its final data type, at a time; embedding and head, which are
    large, take theirs in parts where the engine allows it.

    Args:
        model: A causal language model or a PEFT model around one, its weights perhaps mapped from files.
        sharding: How.
        prepare: Is given the modules of each unit while it is whole.
    """
    causal_lm = causal_lm_of(model)
    layers = _layer_names(causal_lm)
    units = [causal_lm.get_submodule(name) for name in reversed(layers)]  # the inner before the outer
    done: set[nn.Module] = set()
    later = _embedding_and_head(causal_lm) if sharding.engine == "fsdp2" else {}
    for name, unit in zip([*reversed(layers), ""], [*units, causal_lm], strict=True):
        own = [module for module in unit.modules() if module not in done]
        done.update(own)
        for module in own if name else [module for module in own if module not in later]:
            for parameter in module.parameters(recurse=False):
                take_final_dtype(parameter)
        prepare(own)
        cut = _fsdp1 if sharding.engine == "fsdp" else _fsdp2
        cut(causal_lm, name, sharding)
    for module, dtype in later.items():
        module.to(dtype)


def _layer_names(causal_lm: Any) -> list[str]:
    names, decoder_layers = set(causal_lm._no_split_modules or ()), set(decoder_layers_of(causal_lm)[1])
    named = list(causal_lm.named_modules())
    layers = [name for name, module in named if type(module).__name__ in names]
    layers = layers or [name for name, module in named if module in decoder_layers]
    if not layers:
        raise ConfigError(
            "trainer.strategy", f"expected a model with a list of layers, found {type(causal_lm).__name__}.", "Use ddp."
        )
    return layers


def _embedding_and_head(causal_lm: Any) -> dict[nn.Module, torch.dtype]:
    """Both with their final data type, unless they are adapted."""
    found = (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    return {module: final_dtype(module.weight) for module in found if type(module) in (nn.Embedding, nn.Linear)}


def _fsdp2(causal_lm: Any, name: str, sharding: Sharding) -> None:
    dtype = sharding.compute_dtype if name else None
    fully_shard(
        causal_lm.get_submodule(name),
        mesh=sharding.mesh,
        mp_policy=MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False),
        offload_policy=_pinned_offload(sharding) if sharding.cpu_offload else OffloadPolicy(),
    )
    if not name:
        # Functions of the model enter it by a side door; FSDP2 gathers weights for the doors it knows.
        causal_lm._call_with = MethodType(_call_with, causal_lm)
        register_fsdp_forward_method(causal_lm, "_call_with")
        causal_lm.__dict__[RUN_GATHERED] = MethodType(_run_gathered, causal_lm)


def _fsdp1(causal_lm: Any, name: str, sharding: Sharding) -> None:
    mesh, dtype = sharding.mesh, sharding.compute_dtype if name else None
    unit = FullyShardedDataParallel(
        causal_lm.get_submodule(name),
        device_mesh=mesh,
        device_id=torch.device("cuda", torch.cuda.current_device())
        if mesh.device_type == "cuda"
        else torch.device("cpu"),
        use_orig_params=True,
        cpu_offload=CPUOffload(sharding.cpu_offload and mesh.device_type != "cpu"),
        mixed_precision=MixedPrecision(
            param_dtype=dtype,
            reduce_dtype=torch.float32 if dtype else None,
            buffer_dtype=torch.float32 if dtype else None,
            cast_root_forward_inputs=False,
        ),
    )
    if name:
        parent, _, child = name.rpartition(".")
        setattr(causal_lm.get_submodule(parent), child, unit)
        return
    forward = causal_lm.forward

    def forward_or_call(causal_lm: Any, *args: Any, function: Callable[[Any], Any] | None = None, **named: Any) -> Any:
        return forward(*args, **named) if function is None else function(causal_lm)

    causal_lm.forward = MethodType(forward_or_call, causal_lm)
    # Beside the tree of modules, which would have a loop otherwise.
    causal_lm.__dict__[RUN_GATHERED] = lambda function: unit(function=function)
    causal_lm.__dict__["fsdp1_root"] = [unit]


def _call_with(causal_lm: Any, function: Callable[[Any], Any]) -> Any:
    return function(causal_lm)


def _run_gathered(causal_lm: Any, function: Callable[[Any], Any]) -> Any:
    found = causal_lm._call_with(function)
    if not torch.is_grad_enabled():
        causal_lm.reshard()  # FSDP2 leaves what is outside of layers to a backward pass, which does not come
    return found


def _pinned_offload(sharding: Sharding) -> CPUOffloadPolicy:
    return CPUOffloadPolicy(pin_memory=sharding.mesh.device_type != "cpu")


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` was called on it."""
    return hasattr(causal_lm_of(model), RUN_GATHERED)


def fsdp1_root(model: Any) -> FullyShardedDataParallel:
    """The wrapper of a model that FSDP1 has cut up."""
    return causal_lm_of(model).fsdp1_root[0]  # type: ignore[no-any-return]


def plain_name(name: str) -> str:
    """A parameter's name without what FSDP1 has put around modules."""
    return name.replace(_WRAPPED, "")


def whole(value: Any) -> Any:
    """A sharded tensor as a whole one on the CPU, by a collective; anything else as it is."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def own_part(value: Any) -> Any:
    """What this process has of a sharded tensor; anything else as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def cut_like(part: Any, value: Any) -> Any:
    """A copy of a whole tensor, which every process has, cut up like another if it has its shape; else as it is."""
    if isinstance(value, DTensor) or not isinstance(value, Tensor):
        return value
    if not isinstance(part, DTensor) or value.shape != part.shape:
        return value.clone()
    # A copy, since the part would keep the whole tensor alive.
    return distribute_tensor(value.to(part.device), part.device_mesh, part.placements, src_data_rank=None).clone()


def is_cut(value: Any) -> bool:
    """Whether a tensor is spread over processes."""
    return isinstance(value, DTensor)


# --- FSDP1 keeps parts that cross the borders of tensors; it makes tensors of them, and takes them back


def fsdp1_weights(root: FullyShardedDataParallel) -> dict[str, Any]:
    """All weights, cut up tensor by tensor; a collective."""
    with _tensor_by_tensor(root):
        return root.state_dict()


def set_fsdp1_weights(root: FullyShardedDataParallel, weights: dict[str, Any]) -> None:
    """The inverse of :func:`fsdp1_weights`."""
    names = {plain_name(name) for name, _ in root.module.named_parameters()}  # a tied weight has a second name
    with _tensor_by_tensor(root):
        root.load_state_dict({name: value for name, value in weights.items() if name in names}, strict=False)


def fsdp1_moments(root: FullyShardedDataParallel, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state by name of parameter, cut up tensor by tensor; a collective."""
    with _tensor_by_tensor(root):
        return FullyShardedDataParallel.optim_state_dict(root, optimizer)


def fsdp1_moments_to_load(
    root: FullyShardedDataParallel, optimizer: Optimizer, moments: dict[str, Any]
) -> dict[str, Any]:
    """What the optimizer takes of the result of :func:`fsdp1_moments`."""
    with _tensor_by_tensor(root):
        return FullyShardedDataParallel.optim_state_dict_to_load(root, optimizer, moments)


@contextlib.contextmanager
def _tensor_by_tensor(root: FullyShardedDataParallel) -> Iterator[None]:
    # On a CPU, offloading frees the storage that it then copies.
    offload = next(root.parameters()).device.type != "cpu"
    with FullyShardedDataParallel.state_dict_type(
        root,
        StateDictType.SHARDED_STATE_DICT,
        ShardedStateDictConfig(offload_to_cpu=offload),
        ShardedOptimStateDictConfig(offload_to_cpu=offload),
    ):
        yield
