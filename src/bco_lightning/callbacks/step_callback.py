"""One event for everything that follows a run: an optimizer step has ended. The reward shift moves then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from typing_extensions import override

from bco_lightning.batch import FeedbackBatch, ScoredRows, StepSummary, micro_batches_of
from bco_lightning.errors import ConfigError
from bco_lightning.objectives import sums_of_rewards
from bco_lightning.parallel.collectives import max_over_ranks, sum_over_ranks
from bco_lightning.parallel.sharding import sharding_of

_REWARDS = ("sum_up", "num_up", "sum_down", "num_down")
_LIGHTNINGS_OWN_INTERVAL, _EACH_AT_FIRST, _POINTS = 50, 100, 200


class StepCallback(Callback):
    """A callback that follows optimizer steps, each of which comes once, however many micro-batches it has.

    Processes tell each other about a step once, in one sum: what every callback has to tell joins it by
    :meth:`numbers_of_step` and comes back, summed, in ``summary.totals``. So no callback needs a collective of its own.
    """

    def numbers_of_step(self, trainer: Trainer, module: Any) -> Mapping[str, float | Tensor]:
        """What this process has to tell the others of the step, before the optimizer moves.

        Numbers by name, the same names on every process: counts, sums, 1 for yes; tensors, of the same shape on
        every process, are not waited for. The module has the gradients and ``step_rows`` of the step.
        """
        return {}

    def names_logged(self, trainer: Trainer) -> Iterable[str]:
        """Names of numbers that this callback logs and others can monitor, known before the first step."""
        return ()

    def on_before_step(self, trainer: Trainer, module: Any, optimizer: Any, summary: StepSummary) -> None:
        """Called on every process once the step is summed, before the optimizer and the reward shift move."""

    def on_step_end(self, trainer: Trainer, module: Any, summary: StepSummary) -> None:
        """Called once per optimizer step, after it; ``trainer.global_step`` is ``summary.step``."""

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        summary: StepSummary | None = pl_module.step_summary
        if summary is not None:  # the module has it from a step's last micro-batch until the next begins
            self.on_step_end(trainer, pl_module, summary)


class RewardShiftUpdate(StepCallback):
    """Feeds all micro-batches and ranks of a step to ``module.reward_shift`` and the objective's baselines, after it.

    During a step they stand still, so the step's gradient does not depend on how it was cut. They are part of the
    module's objective, and the module puts them into checkpoints. A subclass that the trainer is given is used instead.
    """

    @override
    def on_step_end(self, trainer: Trainer, module: Any, summary: StepSummary) -> None:
        module.reward_shift.update(**{name: getattr(summary, name) for name in _REWARDS})
        if summary.baseline_sums:
            module.objective.update(summary.baseline_sums)


def summarize_step(trainer: Any, module: Any, optimizer: Any) -> None:
    """Sums a step over its micro-batches and processes into ``module.step_summary``; callbacks then look at it.

    It is the only collective of a step besides those of the strategy, and the only time that the device is waited for.
    """
    callbacks = [callback for callback in trainer.callbacks if isinstance(callback, StepCallback)]
    told: dict[str, float | Tensor] = dict(_sums_of_rewards(module.step_rows))
    for name in module.objective.sum_names:  # of a baseline
        told[name] = sum((rows.baseline_sums[name] for rows in module.step_rows), start=0.0)
    for name in module.step_rows[0].routing_sums if module.step_rows else ():
        told[name] = torch.stack([rows.routing_sums[name] for rows in module.step_rows]).sum(0)
    for callback in callbacks:
        own = callback.numbers_of_step(trainer, module)
        if twice := told.keys() & own.keys():
            problem = f"expected one callback that tells {min(twice)!r}, found another in {type(callback).__name__}."
            raise ConfigError("trainer.callbacks", problem, "Leave one of them out.")
        told.update(own)
    totals = _sum_over_ranks(told, trainer)
    module.step_summary = StepSummary(
        step=trainer.global_step + 1,
        rows=tuple(module.step_rows),
        reward_shift=module.reward_shift.value,
        **{name: totals.pop(name) for name in _REWARDS},
        baseline_sums={name: totals.pop(name) for name in module.objective.sum_names},
        totals=totals,
    )
    for callback in callbacks:
        callback.on_before_step(trainer, module, optimizer, module.step_summary)


def passes_of(batch: FeedbackBatch | list[FeedbackBatch], trainer: Any) -> list[tuple[FeedbackBatch, float]]:
    """The micro-batches of a batch, each with its share of the rows; the last perhaps again, with a share of 0."""
    parts = micro_batches_of(batch)
    passes, rows = len(parts), sum(map(len, parts))
    # Sharded models need as many passes in all processes.
    if isinstance(batch, list) and trainer is not None and sharding_of(trainer) is not None:
        passes = int(max_over_ranks(torch.tensor(passes), trainer))
    return [*((part, len(part) / rows) for part in parts), *[(parts[-1], 0.0)] * (passes - len(parts))]


def loss_in_passes(loss_of: Callable[..., Tensor], batch: Any, trainer: Any, *, begins: bool) -> Tensor:
    """The loss of a batch; gradients are added here but for the last, with which Lightning goes to other processes."""
    model: Any = trainer and trainer.strategy.model  # DDP holds gradients; new ones would stand beside them
    in_buckets = getattr(model, "gradient_as_bucket_view", False) and not model.find_unused_parameters
    for optimizer in trainer.optimizers if begins and trainer is not None else ():
        optimizer.zero_grad(set_to_none=not in_buckets)
    *before, last = passes_of(batch, trainer)
    losses: list[Tensor] = []
    for each in before:
        loss = loss_of(*each)
        with torch.autocast(loss.device.type, enabled=False):  # which is for forward passes
            trainer.strategy.backward(loss, None)
        losses.append(loss.detach())
    return sum(losses, start=loss_of(*last))


def log_step(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Logs numbers that are the same on every process under the number of an optimizer step.

    Lightning's loggers and its callbacks that monitor a name get the same numbers; by ``log`` alone the former would
    count steps from 0 and leave the first one out.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
    # Lightning would make a metric of each, to be reduced at the end of an epoch: 10 ms a step.
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})


def is_time_to_log(trainer: Any, step: int, first_too: bool = False) -> bool:
    """Whether numbers of the steps up to this one are due.

    Where ``trainer.log_every_n_steps`` is left at Lightning's own value, each of the first hundred steps is, and then
    so many that a run has two hundred; another value is taken at its word.
    """
    interval: int = trainer.log_every_n_steps
    if interval == _LIGHTNINGS_OWN_INTERVAL:
        interval = 1 if step <= _EACH_AT_FIRST else max(1, trainer.lightning_module.num_steps() // _POINTS)
    return interval > 0 and (step % interval == 0 or (first_too and step == 1))


def _sums_of_rewards(step_rows: list[ScoredRows]) -> Mapping[str, float | Tensor]:
    """Sum and number of the rewards of thumbs-up and of thumbs-down rows."""
    if not step_rows:
        return dict.fromkeys(_REWARDS, 0.0)
    on_cpu = step_rows[0].rewards_B.device.type == "mps"  # which has no float64
    rewards_B = torch.cat([rows.rewards_B.cpu() if on_cpu else rows.rewards_B for rows in step_rows])
    up_B = torch.cat([rows.thumbs_up_B for rows in step_rows]).to(rewards_B.device)
    return sums_of_rewards(rewards_B, up_B)


def _sum_over_ranks(numbers: Mapping[str, float | Tensor], trainer: Trainer) -> dict[str, Any]:
    """Adds numbers over all processes: one tensor in float64, one collective, one wait for the device."""
    root = trainer.strategy.root_device
    device = root if root.type != "mps" else torch.device("cpu")
    known = {name: value for name, value in numbers.items() if not isinstance(value, Tensor)}
    awaited = {name: value.detach() for name, value in numbers.items() if isinstance(value, Tensor)}
    sent = torch.tensor(list(known.values()), dtype=torch.float64).to(device, non_blocking=True)
    values = torch.cat([sent, *(value.to(device).double().flatten() for value in awaited.values())])
    sizes = [*(1 for _ in known), *(value.numel() for value in awaited.values())]
    parts = dict(zip([*known, *awaited], sum_over_ranks(values, trainer).split(sizes), strict=True))
    return {name: part.item() if len(part) == 1 else part.view(awaited[name].shape) for name, part in parts.items()}
