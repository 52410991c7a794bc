"""``--trainer.strategy fsdp2`` (and ``fsdp``): Lightning's sharded strategy, with weights cut up as they load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import strategies
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.device_mesh import init_device_mesh
from typing_extensions import override

from bco_lightning.errors import ConfigError
from bco_lightning.parallel.sharding import Sharding

_OTHERS = (strategies.DeepSpeedStrategy, strategies.FSDPStrategy, strategies.ModelParallelStrategy)
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # the last one scales gradients, which cut ones do not know


class FSDP2Strategy(strategies.ModelParallelStrategy):
    """``fsdp2``: weights, gradients and moments are cut up over processes by ``fully_shard``.

    Checkpoints hold the parts that each process has, in a form that any other number of processes, ``ddp``, one device
    and ``export`` read; the checkpoints of those are read too.

    Args:
        group: How many processes share one copy of the weights, such as those of a node; all, if left out. Groups
            exchange gradients alone.
        cpu_offload: Keep weights and moments in host memory, and update them there: less GPU memory, much slower.
        options: What else :class:`~lightning.pytorch.strategies.ModelParallelStrategy` takes.
    """

    sharding: Sharding

    def __init__(self, group: int | None = None, cpu_offload: bool = False, **options: Any) -> None:
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1, save_distributed_checkpoint=True, **options)
        self.group, self.cpu_offload = group, cpu_offload

    @override
    def setup_environment(self) -> None:
        # Lightning's "auto" is the number of nodes.
        self._data_parallel_size = processes = self.num_nodes * self.num_processes
        if self.group is not None and (self.group < 1 or processes % self.group):
            problem = f"expected a divisor of {processes} processes, found {self.group}."
            raise ConfigError("trainer.strategy.group", problem)
        if self.cpu_offload and self.process_group_backend is None and self.root_device.type == "cuda":
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # offloaded gradients are summed where they are
        super().setup_environment()
        dtype = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        group = self.group or processes
        copies, names = ((), ("parts",)) if group == processes else ((processes // group,), ("copies", "parts"))
        mesh = init_device_mesh(self.root_device.type, (*copies, group), mesh_dim_names=names)
        self.sharding = Sharding(mesh, dtype, self.cpu_offload)

    @override
    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._module.state_dict()  # type: ignore[no-any-return]

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return optimizer.state_dict()  # type: ignore[no-any-return]

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Every process writes its parts: the checkpoint IO is asked in all of them."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint, of each tensor only what this process has of it."""
        fitting = self._module.trainer.state.fn == TrainerFn.FITTING
        return self.checkpoint_io.load_checkpoint(  # type: ignore[call-arg]
            checkpoint_path, weights=self._module.state_dict(), moments=fitting
        )

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes the weights of a checkpoint; the module has checked that none lacks."""
        self._module.load_state_dict(checkpoint["state_dict"], strict=False)

    @property
    def _module(self) -> Any:
        return self.lightning_module


def refuse_unknown(strategy: Any, precision: str) -> None:
    """Refuses precisions that are not known to be right here, and sharding that knows nothing of these models."""
    is_cut = isinstance(strategy, FSDP2Strategy)
    known = _PRECISIONS[:2] if is_cut else _PRECISIONS
    if precision not in known:
        found = f"found {precision}: others would cast the policy and not its reference"
        remedy = "Set model.dtype: bfloat16 for bfloat16 weights."
        raise ConfigError("trainer.precision", f"expected {' or '.join(known)}, {found}.", remedy)
    on_gpu = precision == "bf16-mixed" and isinstance(strategy.accelerator, CUDAAccelerator)
    if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        rank_zero_warn(f"this GPU emulates bfloat16, slowly. Set trainer.precision: {known[0 if is_cut else -1]}.")
    if not is_cut and isinstance(strategy, _OTHERS):
        problem = f"expected one of this package, found Lightning's {type(strategy).__name__}."
        remedy = "Use fsdp2, or from Python strategy=bco_lightning.parallel.strategy.FSDP2Strategy()."
        raise ConfigError("trainer.strategy", problem, remedy)


def named_strategy(name: str) -> Any:
    """What a name of ``trainer.strategy`` stands for; names that Lightning takes itself come back as they are."""
    if name == "ddp":
        return strategies.DDPStrategy(gradient_as_bucket_view=True)  # or all gradients are held twice
    return name.replace("fsdp", "fsdp2") if name in ("fsdp", "fsdp_cpu_offload") else name


for _name in ("fsdp2", "fsdp"):  # Lightning refuses the latter name on a CPU, whatever it stands for
    _told = "Fully sharded data parallel training (FSDP2)"
    strategies.StrategyRegistry.register(_name, FSDP2Strategy, _told, override=True)
    strategies.StrategyRegistry.register(f"{_name}_cpu_offload", FSDP2Strategy, _told, override=True, cpu_offload=True)
