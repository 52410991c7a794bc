"""FSDP2: the only file that knows what is sharded, and how sharded state becomes whole and is cut up again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from typing_extensions import override

from bco_lightning.models.layout import causal_lm_of
from bco_lightning.models.log_probs import SCORE, score_completions


class FSDP2Strategy(ModelParallelStrategy):
    """``--trainer.strategy fsdp2``: parameters, gradients and moments are sharded over all processes.

    Checkpoints hold whole tensors, in the form that one device writes; so they go from any number of processes, and
    from ``ddp``, to any other. Only the first process writes; each gathers what is trained.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(
            data_parallel_size="auto", tensor_parallel_size=1, save_distributed_checkpoint=False, **options
        )

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def setup_environment(self) -> None:
        # Lightning's "auto" is the number of nodes.
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, whole; a collective."""
        return {name: whole(value) for name, value in self.lightning_module.state_dict().items()}  # type: ignore[union-attr]

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state, whole, in the first process, which writes it; a collective."""
        return _for_each_moment(optimizer.state_dict(), lambda _, value: self._for_the_writer(whole(value)))

    def _for_the_writer(self, value: Any) -> Any:
        return value if self.is_global_zero else None

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    @override
    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Cuts up whole weights; the module has checked that none lacks."""
        parameters = dict(self.lightning_module.named_parameters())  # type: ignore[union-attr]
        for name, value in checkpoint["state_dict"].items():
            parameters[name].copy_(_cut_like(parameters[name], value))

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Cuts up whole moments."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            optimizer.load_state_dict(
                _for_each_moment(state, lambda number, value, own=parameters: _cut_like(own[number], value))  # type: ignore[misc]
            )


def shard(model: nn.Module, mesh: Any) -> None:
    """Shards a language model in place: each decoder layer for itself, and what is left of it.

    Args:
        model: A causal language model or a PEFT model around one.
        mesh: Lightning's device mesh.
    """
    causal_lm = causal_lm_of(model)
    data_parallel = mesh["data_parallel"]
    names = set(causal_lm._no_split_modules or ())
    for module in causal_lm.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=data_parallel)
    fully_shard(causal_lm, mesh=data_parallel)
    # Completion log-probs enter the model by a side door; FSDP2 gathers weights for the doors it knows.
    setattr(causal_lm, SCORE, MethodType(score_completions, causal_lm))
    register_fsdp_forward_method(causal_lm, SCORE)


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` was called on it."""
    return hasattr(causal_lm_of(model), SCORE)


def whole(value: Any) -> Any:
    """A sharded tensor as a whole one on the CPU, by a collective; anything else as it is."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _cut_like(parameter: Tensor, value: Any) -> Any:
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _for_each_moment(state: Mapping[str, Any], change: Callable[[int, Any], Any]) -> dict[str, Any]:
    moments = {
        number: {name: change(number, value) for name, value in moment.items()}
        for number, moment in state["state"].items()
    }
    return {**state, "state": moments}


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded data parallel training (FSDP2)")
