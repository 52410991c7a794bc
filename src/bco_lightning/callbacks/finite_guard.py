"""Stop, or skip the step, before a value that is not finite reaches weights, moments or reward shift."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.distributed import gather_over_ranks, max_over_ranks
from bco_lightning.errors import ConfigError, NonFiniteError
from bco_lightning.models.parallel import own_part, plain_name
from bco_lightning.module import BCOModule

_SHOWN = 5


class FiniteGuard(Callback):
    """Looks at log-probs, losses and gradients of a step before the optimizer does; all processes decide together.

    It costs one collective of one number and one look at the gradients per optimizer step.

    Args:
        policy: ``stop`` ends the run on every process in the same step. ``skip`` leaves the step out: weights, moments
            and reward shift stay as they are, the rows of the step count as seen.
        max_skipped: How many steps of a run may be left out before it stops after all.

    Raises:
        ConfigError: If ``max_skipped`` is negative.
    """

    def __init__(self, policy: Literal["stop", "skip"] = "stop", max_skipped: int = 10) -> None:
        if max_skipped < 0:
            raise ConfigError("guard.max_skipped", f"expected a number of steps, found {max_skipped}.")
        self.policy, self.max_skipped = policy, max_skipped
        self.skipped = 0

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: BCOModule, optimizer: Any) -> None:  # type: ignore[override]
        found = self._findings(trainer, pl_module)
        if not max_over_ranks([float(bool(found))], trainer)[0]:
            return
        told = [
            f"rank {rank}: {finding}" for rank, own in enumerate(gather_over_ranks(found, trainer)) for finding in own
        ]
        problem = f"expected finite numbers, found {'; '.join(told)}."
        place = f"optimizer step {trainer.global_step}"
        if self.policy == "stop" or self.skipped >= self.max_skipped:
            limit = f" ({self.skipped} steps were skipped before, which is the limit.)" if self.skipped else ""
            raise NonFiniteError(
                place,
                problem + limit,
                "Weights, optimizer and reward shift are as before the step. A lower model.learning_rate often helps.",
            )
        self.skipped += 1
        rank_zero_warn(f"{place}: {problem} Skipped ({self.skipped} of at most {self.max_skipped}).")
        for logger in trainer.loggers:
            logger.log_metrics({"train/skipped_steps": float(self.skipped)}, step=trainer.global_step)
        # Parameters without a gradient are passed over by optimizers: neither they nor their moments change.
        optimizer.zero_grad(set_to_none=True)
        pl_module.step_rows.clear()

    def _findings(self, trainer: Trainer, module: BCOModule) -> list[str]:
        """What is not finite in this process, with row ids and their places in the log."""
        # A scaler of float16 gradients expects infinities, and skips such steps itself.
        gradient = [] if trainer.precision == "16-mixed" else self._gradient_findings(trainer, module)
        findings = []
        for name in ("policy_log_probs_B", "reference_log_probs_B", "losses_B"):
            values = torch.cat([getattr(rows, name) for rows in module.step_rows])
            if not bool(values.isfinite().all()):
                ids = torch.cat([rows.row_ids_B for rows in module.step_rows])
                findings.append(
                    f"{name.removesuffix('_B').replace('_', ' ')} {_values(values)} "
                    f"in rows {_places(trainer, ids[~values.isfinite()].tolist())}"
                )
        return findings or gradient

    def _gradient_findings(self, trainer: Trainer, module: BCOModule) -> list[str]:
        parts = {plain_name(n): own_part(p.grad) for n, p in module.named_parameters() if p.grad is not None}
        # Some processes have nothing of a tensor with few rows, of which no norm can be taken.
        gradients = [part for part in parts.values() if part.numel()]
        if not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients, norm_type=math.inf))):
            return []
        names = [name for name, part in parts.items() if not part.isfinite().all()]
        ids = torch.cat([rows.row_ids_B for rows in module.step_rows]).tolist()
        return [f"gradient of {', '.join(names[:1])} ({len(names)} parameters) from rows {_places(trainer, ids)}"]

    @override
    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    @override
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped = state_dict["skipped"]


def _values(values: torch.Tensor) -> str:
    return ", ".join(sorted({str(float(value)) for value in values[~values.isfinite()]}))


def _places(trainer: Any, row_ids: list[int]) -> str:
    data = getattr(trainer, "datamodule", None)
    shown = [
        f"{row} ({data.place_of(row)})" if isinstance(data, FeedbackDataModule) else str(row)
        for row in row_ids[:_SHOWN]
    ]
    more = f" and {len(row_ids) - _SHOWN} more" if len(row_ids) > _SHOWN else ""
    return ", ".join(shown) + more
