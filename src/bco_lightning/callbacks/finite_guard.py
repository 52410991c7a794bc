"""Stop, or skip the step, before a value that is not finite reaches weights, moments or reward shift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from bco_lightning.batch import StepSummary
from bco_lightning.callbacks.step_callback import StepCallback, log_step
from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.errors import ConfigError, NonFiniteError
from bco_lightning.parallel.collectives import gather_over_ranks
from bco_lightning.parallel.sharding import copies_of_parameters, own_part

if TYPE_CHECKING:
    from bco_lightning.module import BCOModule

_SHOWN = 5
_SCORES = ("policy_log_probs_B", "reference_log_probs_B", "losses_B")


class FiniteGuard(StepCallback):
    """Looks at log-probs, losses, gradients and what baselines learn of a step before the optimizer does.

    All processes decide together: whether one has found any is one number of the step's sum; only then do they tell
    each other more.

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
    def numbers_of_step(self, trainer: Trainer, module: BCOModule) -> Mapping[str, float | Tensor]:
        scores = torch.cat([getattr(rows, name) for name in _SCORES for rows in module.step_rows])
        learned = [value.isfinite().view(1) for rows in module.step_rows for value in rows.baseline_sums.values()]
        told = {"not_finite": ~torch.cat([scores.isfinite(), *learned]).all()}
        gradients = [part for part in _gradients(trainer, module).values() if part.numel()]
        if gradients:
            norm = torch.nn.utils.get_total_norm(gradients).double()
            told["not_finite"] = told["not_finite"] | ~norm.to(scores.device).isfinite()
            told["gradient_square"] = norm.square() / copies_of_parameters(trainer)
        return told

    @override
    def on_before_step(self, trainer: Trainer, module: BCOModule, optimizer: Any, summary: StepSummary) -> None:
        if not summary.totals["not_finite"]:
            return
        findings = gather_over_ranks(_findings(trainer, module), trainer)
        if not any(findings):  # the square of a gradient is too large for its type, the gradient is not
            return
        told = "; ".join(f"rank {rank}: {finding}" for rank, own in enumerate(findings) for finding in own)
        problem = f"expected finite numbers, found {told}."
        place = f"optimizer step {trainer.global_step}"
        if self.policy == "stop" or self.skipped >= self.max_skipped:
            limit = f" ({self.skipped} steps were skipped before, which is the limit.)" if self.skipped else ""
            kept = "Weights, optimizer and reward shift are as before the step."
            raise NonFiniteError(place, problem + limit, f"{kept} A lower model.learning_rate often helps.")
        self.skipped += 1
        rank_zero_warn(f"{place}: {problem} Skipped ({self.skipped} of at most {self.max_skipped}).")
        log_step(trainer, {"train/skipped_steps": float(self.skipped)}, trainer.global_step)
        # Parameters without a gradient are passed over by optimizers: neither they nor their moments change.
        optimizer.zero_grad(set_to_none=True)
        module.step_rows.clear()
        module.step_summary = summary.left_out()

    @override
    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    @override
    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped = state_dict["skipped"]


def _gradients(trainer: Trainer, module: BCOModule) -> dict[str, Tensor]:
    """This process's parts of them; of a tensor with few rows it may have nothing, of which no norm can be taken."""
    if trainer.precision == "16-mixed":  # its scaler expects infinities, and skips such steps itself
        return {}
    return {name: own_part(p.grad) for name, p in module.named_parameters() if p.grad is not None}


def _findings(trainer: Trainer, module: BCOModule) -> list[str]:
    """What is not finite in this process, with row ids and their places in the log; gradients if nothing else is."""
    ids = torch.cat([rows.row_ids_B for rows in module.step_rows])
    findings = []
    for name in _SCORES:
        values = torch.cat([getattr(rows, name) for rows in module.step_rows])
        broken = ~values.isfinite()
        if bool(broken.any()):
            words = ", ".join(sorted({str(value) for value in values[broken].tolist()}))
            name = name.removesuffix("_B").replace("_", " ")
            findings.append(f"{name} {words} in rows {_places(trainer, ids[broken].tolist())}")
    learned = [pair for rows in module.step_rows for pair in rows.baseline_sums.items() if not pair[1].isfinite()]
    if learned and not findings:  # of rows that no loss is computed of
        findings = ["{} {:g}, which a baseline learns, of rows {}".format(*learned[0], _places(trainer, ids.tolist()))]
    names = [name for name, part in _gradients(trainer, module).items() if not part.isfinite().all()]
    if names and not findings:
        findings = [f"gradient of {names[0]} ({len(names)} parameters) from rows {_places(trainer, ids.tolist())}"]
    return findings


def _places(trainer: Any, row_ids: list[int]) -> str:
    data: Any = getattr(trainer, "datamodule", None)
    known = isinstance(data, FeedbackDataModule)
    shown = [f"{row} ({data.training.place_of(row)})" if known else str(row) for row in row_ids[:_SHOWN]]
    return ", ".join(shown) + (f" and {len(row_ids) - _SHOWN} more" if len(row_ids) > _SHOWN else "")
