"""``--trainer.strategy fsdp2`` and ``fsdp``: Lightning's sharded strategies, with weights that are cut up as they load.

Checkpoints hold the parts that each process has, in a form that any other number of processes, ``ddp``, one device and
``export`` read; the checkpoints of those are read too.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import FSDPPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from bco_lightning.checkpointing import (
    begin_folder,
    complete_folder,
    facts_of,
    flushed_file,
    in_checkpoint_words,
    read_checkpoint,
    saved_steps,
    write_state,
)
from bco_lightning.distributed import errors_of_all, gather_over_ranks
from bco_lightning.errors import CheckpointError, ConfigError
from bco_lightning.models.parallel import (
    Sharding,
    cut_like,
    fsdp1_moments,
    fsdp1_moments_to_load,
    fsdp1_root,
    fsdp1_weights,
    is_cut,
    make_mesh,
    plain_name,
    set_fsdp1_weights,
)
from bco_lightning.shards import (
    files_of,
    has_shards,
    is_moment,
    parameter_of,
    put_shards,
    read_shards,
    shapes_of,
    take_shards,
    write_shards,
)

_PRECISIONS = ("32-true", "bf16-mixed")


class ShardedStrategy(ParallelStrategy):
    """What ``fsdp`` and ``fsdp2`` have in common: every process writes and reads its own parts of checkpoints."""

    sharding: Sharding
    may_fall_back = False  # to an earlier step, where a damaged one was not asked for by its name

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @property
    def _trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name, in the optimizer's order."""
        named = self.lightning_module.named_parameters()  # type: ignore[union-attr]
        return {plain_name(name): parameter for name, parameter in named if parameter.requires_grad}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a folder, whole or not at all.

        Raises:
            CheckpointError: In every process, if one of them cannot write.
        """
        target, failures = Path(filepath), list[CheckpointError]()
        plain, shards = take_shards(checkpoint, is_cut)
        folder: Path | None = None
        with _noting(failures, target):
            folder = begin_folder(target) if self.is_global_zero else None
        folder = self.broadcast(folder)
        written: dict[str, Any] = {}
        with _noting(failures, target):
            if folder is not None:
                write_shards(shards, folder)
                written = {file.name: flushed_file(file) for file in files_of(self.global_rank, folder)}
        known = {name: facts for files in gather_over_ranks(written, self._trainer) for name, facts in files.items()}
        told = errors_of_all(failures, self._trainer)
        with _noting(failures, target):
            if self.is_global_zero and folder is not None and not told:
                write_state(plain, folder)
                _require_files(folder, known)
                complete_folder(folder, target, facts_of(checkpoint), known)
        told = errors_of_all(failures, self._trainer)
        if told and self.local_rank == 0 and folder is not None:  # a node may have one of its own
            shutil.rmtree(folder, ignore_errors=True)
        for error in told:
            raise error

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint, from shards only what this process has of each tensor."""
        folder = Path(checkpoint_path)
        folder, checkpoint = self._read(folder)
        if not folder.is_dir() or not has_shards(folder):
            return checkpoint
        fitting = self._trainer.state.fn == TrainerFn.FITTING
        weights, names = self.lightning_module_state_dict(), list(self._trained)
        parts: dict[str, Any] = {}
        for key, (_, dtype) in shapes_of(folder).items():
            like = weights.get(parameter_of(key, names) or "")
            if like is not None and (fitting or not is_moment(key)):
                parts[key] = torch.empty_like(like, dtype=dtype)
        read_shards(folder, parts)
        put_shards(checkpoint, parts)
        return checkpoint

    def _read(self, folder: Path) -> tuple[Path, dict[str, Any]]:
        """A checkpoint without its parts, which all processes have verified together; or that of an earlier step."""
        checkpoint, failures = dict[str, Any](), list[CheckpointError]()
        with _noting(failures):
            share = (self.global_rank, self.world_size)
            checkpoint = read_checkpoint(str(folder), with_shards=False, share=share)
            for key in checkpoint.keys() - {"state_dict", "optimizer_states"}:
                checkpoint[key] = copy.deepcopy(checkpoint[key])  # from now on without the file
        errors = errors_of_all(failures, self._trainer)
        if not errors:
            return folder, checkpoint
        earlier = [step for step in saved_steps(folder.parent) if step.name < folder.name]
        if not (self.may_fall_back and earlier):
            raise errors[0]
        rank_zero_info(f"checkpoint: skipped {errors[0]}")
        return self._read(earlier[-1])

    @property
    def _trainer(self) -> Any:
        return self.lightning_module.trainer  # type: ignore[union-attr]

    def _cut_moments(self, state: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
        weights = list(self.lightning_module_state_dict().values())
        return {
            number: {name: cut_like(weights[number], value) for name, value in moments.items()}
            for number, moments in state["state"].items()
        }


class FSDP2Strategy(ShardedStrategy, ModelParallelStrategy):
    """``fsdp2``: weights, gradients and moments are cut up over processes by ``fully_shard``.

    Args:
        group: How many processes share one copy of the weights, such as those of a node; all, if left out. Groups
            exchange gradients alone.
        cpu_offload: Keep weights and moments in host memory, and update them there: less GPU memory, much slower.
        options: What else :class:`~lightning.pytorch.strategies.ModelParallelStrategy` takes.
    """

    def __init__(self, group: int | None = None, cpu_offload: bool = False, **options: Any) -> None:
        super().__init__(data_parallel_size="auto", tensor_parallel_size=1, save_distributed_checkpoint=True, **options)
        self.group, self.cpu_offload = group, cpu_offload

    @override
    def setup_environment(self) -> None:
        # Lightning's "auto" is the number of nodes.
        self._data_parallel_size = processes = self.num_nodes * self.num_processes
        if self.group is not None and (self.group < 1 or processes % self.group):
            raise ConfigError(
                "trainer.strategy.group", f"expected a divisor of {processes} processes, found {self.group}."
            )
        if self.cpu_offload and self.process_group_backend is None:
            self._process_group_backend = _backend_for_both(self.root_device)
        super().setup_environment()
        mesh = make_mesh(self.root_device.type, self.world_size, self.group)
        precision = self.precision_plugin.precision
        self.sharding = Sharding("fsdp2", mesh, _compute_dtype(precision), self.cpu_offload)

    @override
    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.lightning_module.state_dict()  # type: ignore[union-attr]

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return optimizer.state_dict()  # type: ignore[no-any-return]

    @override
    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes the weights of a checkpoint; the module has checked that none lacks."""
        trained = self._trained
        for name, value in checkpoint["state_dict"].items():
            trained[name].copy_(cut_like(trained[name], value))

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict({**state, "state": self._cut_moments(state)})


class FSDP1Strategy(ShardedStrategy, FSDPStrategy):
    """``fsdp``: the same by ``FullyShardedDataParallel`` (FSDP1); ``fsdp2`` is the better choice where both work.

    Lightning refuses the name ``fsdp`` on a CPU, so outside of this package's command line give an object:
    ``Trainer(strategy=FSDP1Strategy())``.

    Args:
        cpu_offload: Keep weights and moments in host memory, and update them there; without accumulation, of which
            FSDP1 would keep the last micro-batch's gradients alone.
        process_group_backend: As for :class:`~lightning.pytorch.strategies.FSDPStrategy`.
    """

    def __init__(self, cpu_offload: bool = False, process_group_backend: str | None = None) -> None:
        super().__init__(cpu_offload=cpu_offload, process_group_backend=process_group_backend)
        self._offloads = cpu_offload

    @property
    @override
    def precision_plugin(self) -> FSDPPrecision:
        return self._precision_plugin or _FSDP1Precision("32-true", self)  # type: ignore[return-value]

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        precision = getattr(precision_plugin, "precision", "32-true")
        self._precision_plugin = _FSDP1Precision(precision, self)  # type: ignore[assignment]

    @override
    def setup_environment(self) -> None:
        if self._offloads and self.process_group_backend is None:
            self._process_group_backend = _backend_for_both(self.root_device)
        super().setup_environment()
        mesh = make_mesh(self.root_device.type, self.world_size)
        precision = self.precision_plugin.precision
        self.sharding = Sharding("fsdp", mesh, _compute_dtype(precision), self._offloads)

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:
        return model  # the module has wrapped it

    @property
    def _policy(self) -> Any:
        return self.lightning_module.policy  # type: ignore[union-attr]

    @property
    def _prefix(self) -> str:
        """What names in the module have before the names in the wrapped model."""
        wrapped = fsdp1_root(self._policy).module
        return next(f"{name}." for name, module in self.lightning_module.named_modules() if module is wrapped)  # type: ignore[union-attr]

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        trained, prefix = self._trained, self._prefix
        weights = {prefix + name: value for name, value in fsdp1_weights(fsdp1_root(self._policy)).items()}
        return {name: weights[name] for name in trained}

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        moments, prefix = fsdp1_moments(fsdp1_root(self._policy), optimizer)["state"], self._prefix
        known = {prefix + name: state for name, state in moments.items()}
        return {
            "state": {number: known[name] for number, name in enumerate(self._trained) if name in known},
            "param_groups": optimizer.state_dict()["param_groups"],
        }

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Takes the weights of a checkpoint; the module has checked that none lacks."""
        root, prefix = fsdp1_root(self._policy), self._prefix
        weights = fsdp1_weights(root)
        for name, value in checkpoint["state_dict"].items():
            within = name.removeprefix(prefix)
            weights[within] = cut_like(weights[within], value)
        set_fsdp1_weights(root, weights)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        names = [name.removeprefix(self._prefix) for name in self._trained]
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            moments = {names[number]: values for number, values in self._cut_moments(state).items()}
            groups = [{**group, "params": [names[at] for at in group["params"]]} for group in state["param_groups"]]
            by_name = {"state": moments, "param_groups": groups}
            optimizer.load_state_dict(fsdp1_moments_to_load(fsdp1_root(self._policy), optimizer, by_name))


class _FSDP1Precision(FSDPPrecision):
    """Autocast as under other strategies; weights keep their data types, and gradients are clipped by their norm."""

    def __init__(self, precision: Any, strategy: FSDP1Strategy) -> None:
        super().__init__(precision)
        self._strategy = strategy

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    @override
    def convert_input(self, data: Any) -> Any:
        return data

    @override
    def convert_output(self, data: Any) -> Any:
        return data

    @override
    def forward_context(self) -> contextlib.AbstractContextManager[Any]:
        if "mixed" not in self.precision:
            return contextlib.nullcontext()
        return torch.autocast(self._strategy.root_device.type, torch.bfloat16)

    @override
    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:  # type: ignore[override]
        fsdp1_root(self._strategy._policy).clip_grad_norm_(clip_val)


def refuse_unknown_sharding(strategy: Any, precision: str, accumulation: int) -> None:
    """Refuses Lightning's own sharded strategies, which know nothing of this package's models.

    Raises:
        ConfigError: If the strategy, or what it would have to do, is none that was tried.
    """
    if isinstance(strategy, FSDP1Strategy) and strategy.sharding.cpu_offload and accumulation > 1:
        raise ConfigError(
            "trainer.accumulate_grad_batches",
            f"expected 1 under fsdp_cpu_offload, found {accumulation}.",
            "Use fsdp2_cpu_offload.",
        )
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)) and not isinstance(strategy, ShardedStrategy):
        raise ConfigError(
            "trainer.strategy",
            f"expected one of this package, found Lightning's {type(strategy).__name__}.",
            "Use fsdp2, or from Python strategy=bco_lightning.strategies.FSDP1Strategy().",
        )
    if isinstance(strategy, ShardedStrategy) and precision not in _PRECISIONS:
        raise ConfigError(
            "trainer.precision", f"expected {' or '.join(_PRECISIONS)} with this strategy, found {precision}."
        )


def named_strategy(name: str) -> Any:
    """What a name of ``trainer.strategy`` stands for; names that Lightning takes itself come back as they are."""
    made: dict[str, Callable[[], Any]] = {
        "ddp": lambda: DDPStrategy(gradient_as_bucket_view=True),  # or all gradients are held twice
        "fsdp": FSDP1Strategy,
        "fsdp_cpu_offload": lambda: FSDP1Strategy(cpu_offload=True),
    }
    return made[name]() if name in made else name


@contextlib.contextmanager
def _noting(failures: list[CheckpointError], written: Path | None = None) -> Iterator[None]:
    """Notes what fails, so that the processes can agree on it; what others would wait for goes on."""
    try:
        with in_checkpoint_words(written) if written else contextlib.nullcontext():
            yield
    except CheckpointError as error:
        failures.append(error)
    except Exception as error:
        failures.append(CheckpointError("checkpoint", f"expected to save or read it, found {error!r}."))


def _require_files(folder: Path, written: Mapping[str, Any]) -> None:
    lacking = sorted(name for name in written if not (folder / name).is_file())
    if lacking:
        raise CheckpointError(
            str(folder),
            f"expected the files of all processes, found {len(lacking)} lacking, the first of them {lacking[0]}.",
            "Processes on several nodes need a run_folder that all of them see.",
        )


def _compute_dtype(precision: str) -> torch.dtype | None:
    return torch.bfloat16 if precision == "bf16-mixed" else None


def _backend_for_both(device: torch.device) -> str | None:
    """Offloaded gradients are summed where they are."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else None


for _name, _options in (("fsdp2", {}), ("fsdp2_cpu_offload", {"cpu_offload": True})):
    if _name not in StrategyRegistry:
        StrategyRegistry.register(
            _name, FSDP2Strategy, description="Fully sharded data parallel training (FSDP2)", **_options
        )
