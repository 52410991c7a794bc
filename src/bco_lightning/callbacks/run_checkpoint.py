"""Save a run at optimizer-step boundaries: every so many steps or minutes, when asked to stop, and at its end."""

from __future__ import annotations

import itertools
import math
import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from bco_lightning.batch import StepSummary
from bco_lightning.callbacks.loggers import METRICS_FILE, SAMPLES_FILE, telling
from bco_lightning.callbacks.step_callback import StepCallback
from bco_lightning.checkpoints.best import BEST_FILE, BestSteps
from bco_lightning.checkpoints.folders import prune, remove_orphans, saved_steps, step_folder, step_of
from bco_lightning.checkpoints.manifest import verify_checkpoint
from bco_lightning.checkpoints.runs import hold_run, let_go_of
from bco_lightning.errors import CheckpointError, ConfigError, PreemptedError, check_choice
from bco_lightning.identity import random_state, set_random_state
from bco_lightning.metrics import better
from bco_lightning.options import at_least
from bco_lightning.parallel.collectives import by_all, gather_over_ranks, max_over_ranks
from bco_lightning.parallel.sharding import sharding_of
from bco_lightning.parallel.signals import STOP_SIGNALS, StopSignals, requeue_slurm_job


class RunCheckpoint(Checkpoint, StepCallback):
    """Writes ``checkpoints/step-N`` folders into the run's folder: each whole, verified, and resumed exactly.

    SIGTERM, SIGINT and SIGUSR1 are noted; all processes then save at the next optimizer-step boundary (or at once,
    while validating) and leave with :class:`~bco_lightning.errors.PreemptedError`. On SLURM, SIGUSR1 also requeues the
    job.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
        every_minutes: Minutes between two checkpoints besides those; 0 for none.
        keep: How many whole checkpoints to keep, at least 2, besides the best one.
        monitor: Name of a metric of held-out rows, such as ``val/loss``; the best step by it, looked at at each
            validation, is saved and kept, and is what ``--ckpt_path best`` means. ``auto`` is ``val/auroc`` where rows
            are held out; ``null`` is for none. Of equal steps the first one is the best, and NaN never is.
        mode: Whether ``max`` or ``min`` of it is best; ``auto`` knows that of losses, AUROC, accuracies and margin.
        if_saving_fails: ``stop`` the run, or ``warn`` and go on without that checkpoint; a run whose last step is not
            saved fails at its end.
        accept_changes: Names of what may differ from the run that is resumed, such as ``beta`` or ``rows``; the
            difference is recorded in the checkpoints that follow.

    Raises:
        ConfigError: If an option is out of range.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        every_minutes: float = 0.0,
        keep: int = 2,
        if_saving_fails: Literal["stop", "warn"] = "stop",
        accept_changes: list[str] | None = None,
        monitor: str | None = "auto",
        mode: Literal["auto", "max", "min"] = "auto",
    ) -> None:
        at_least(1, "step").check("checkpoint.every_n_steps", every_n_steps)
        if every_minutes < 0:
            raise ConfigError("checkpoint.every_minutes", f"expected minutes, or 0 for none; found {every_minutes}.")
        if keep < 2:
            remedy = "One alone would be lost with a bad disk block."
            raise ConfigError("checkpoint.keep", f"expected at least 2, found {keep}.", remedy)
        check_choice("checkpoint.mode", mode, ("auto", "max", "min"))
        self.every_n_steps, self.every_minutes, self.keep = every_n_steps, every_minutes, keep
        self.if_saving_fails, self.accept_changes = if_saving_fails, list(accept_changes or [])
        self.monitor, self.mode = monitor, mode
        name = "val/auroc" if monitor == "auto" else monitor
        # Of a name whose direction is not known, and not told, a run is refused at its start.
        self.best = BestSteps(name, mode if mode != "auto" else better(name or "") or "max")
        self.run_folder: str | None = None  # where the logger writes, unless it is set
        self.folder = Path("checkpoints")
        self.saved: Path | None = None
        self._unsaved: CheckpointError | None = None
        self._first_step = self._num_steps = 0
        self._ended = False
        self._saved_at = time.monotonic()
        self._whole: set[Path] = set()
        self._signals = StopSignals("saving at the end of this optimizer step, then stopping")
        self._progress: dict[str, Any] = {}
        self._accumulation = 1
        self._validation_batches = 0
        self._random_states: list[dict[str, Any]] = []
        self._before_validation: dict[str, Any] = {}
        self._amid_validation = False

    @override
    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit" and not _is_trial(trainer):
            log_dir = trainer.log_dir  # a broadcast: every process has to ask
            run_folder = trainer.strategy.broadcast(self.run_folder)
            self.folder = Path(run_folder or log_dir or trainer.default_root_dir) / "checkpoints"
            by_all(partial(hold_run, self.folder.parent) if trainer.is_global_zero else dict, trainer)
            if trainer.is_global_zero and (removed := remove_orphans(self.folder)):
                rank_zero_info(f"{self.folder}: removed {len(removed)} unfinished checkpoints of a killed run.")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._first_step, self._num_steps, self._ended = trainer.global_step, pl_module.num_steps(), False
        self._saved_at, self._accumulation = time.monotonic(), trainer.accumulate_grad_batches
        resumed_from = step_folder(self.folder, trainer.global_step)
        self.saved = resumed_from if trainer.ckpt_path and Path(trainer.ckpt_path) == resumed_from else None
        self._unsaved, self._amid_validation = None, False
        _require_one_step(trainer)
        if sharding_of(trainer) is not None and not _is_trial(trainer):
            _require_one_folder(self.folder, trainer)
        if trainer.is_global_zero and not _is_trial(trainer):
            self._set_later_steps_aside(trainer.global_step)
            self._take_up_best(trainer.global_step)
        self.best = trainer.strategy.broadcast(self.best)
        self._progress = trainer.fit_loop.state_dict()
        # Lightning's own handlers, set just before, would save in the middle of an accumulation or hang one process.
        self._signals.install()
        if trainer.global_rank < len(self._random_states):
            set_random_state(self._random_states[trainer.global_rank])
        self._random_states = []  # a later fit begins with numbers of its own

    @override
    def numbers_of_step(self, trainer: Trainer, module: Any) -> dict[str, float]:
        due = 0 < self.every_minutes * 60 <= time.monotonic() - self._saved_at
        asked = {number.name: float(self._signals.received == number) for number in STOP_SIGNALS}
        return {**asked, "checkpoint is due": float(due)}

    @override
    def on_step_end(self, trainer: Trainer, module: Any, summary: StepSummary) -> None:
        self._progress = trainer.fit_loop.state_dict()
        asked = next((number for number in STOP_SIGNALS if summary.totals[number.name]), None)
        due, last = summary.totals["checkpoint is due"], summary.step == self._num_steps
        if summary.step % self.every_n_steps == 0 or due or asked or last:
            self._save(trainer)
        if last:
            self._signals.remove()  # everything is saved: whoever stops what follows may do so at once
        elif asked:
            self._leave(trainer, asked)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.should_stop and trainer.global_step > self._first_step:
            self._ended = True
            self._save(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: Any, exception: BaseException | None = None) -> None:
        # Before Lightning puts back the handlers that it found: these here would put back Lightning's own.
        self._signals.remove()
        let_go_of(self.folder.parent)
        if self._unsaved is not None and exception is None:
            remedy = f"{self._unsaved.remedy} Training has ended, but what it came to is not saved"
            newest = f"the newest checkpoint is {self.saved or 'none'}."
            raise CheckpointError(self._unsaved.where, self._unsaved.problem, f"{remedy}; {newest}")

    on_exception = on_train_end

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        batches = sum(int(number) for number in trainer.num_val_batches)
        # Processes may have one batch more or less; they can only agree after batches that all of them have.
        self._validation_batches = -int(max_over_ranks(torch.tensor(-batches), trainer))
        stopping = trainer.early_stopping_callbacks
        self._before_validation = {callback.state_key: callback.state_dict() for callback in stopping if callback}

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not self._signals.installed or trainer.sanity_checking or batch_idx >= self._validation_batches:
            return
        if asked := int(max_over_ranks(torch.tensor(self._signals.received), trainer)):
            self._amid_validation = True
            self._save(trainer)
            self._leave(trainer, signal.Signals(asked))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        is_fit = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self.monitor is None or not is_fit or _is_trial(trainer):
            return
        found, name = trainer.callback_metrics, str(self.best.monitor)
        if name not in found:
            problem = f"expected a name that is logged at a validation, found {name!r}."
            raise ConfigError("checkpoint.monitor", problem, f"Logged are {', '.join(sorted(found))}.")
        value, kl = trainer.strategy.broadcast((float(found[name]), float(found.get("val/kl", math.nan))))
        if not (pl_module.options.allows(kl) and self.best.is_beaten_by(value)):
            return
        self._save(trainer)  # which keeps the best one so far
        if self.saved == step_folder(self.folder, trainer.global_step):
            self.best.values[trainer.global_step] = value
            if trainer.is_global_zero:
                with telling(self.folder / BEST_FILE):
                    self.best.write(self.folder)
            self._prune(trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self._progress and (trainer.validating or self._ended or pl_module.step_summary is None):
            # Saved as of the step boundary before, so that a resumed run validates again from the first row on, and
            # begins a step that another callback saved in the middle of anew.
            checkpoint["loops"] = {**checkpoint["loops"], "fit_loop": self._progress}
            if trainer.validating:  # which will count this validation then
                checkpoint["callbacks"].update(self._before_validation)
            checkpoint["validation_due"] = bool(trainer.validating)
            if self._amid_validation and "current_model_state" in checkpoint:  # by Lightning's averaging
                names = "state_dict", "current_model_state"  # which are exchanged for as long as a validation takes
                checkpoint |= {name: checkpoint[other] for name, other in zip(names, names[::-1], strict=True)}
        elif trainer.training and self._progress:  # else nothing has begun
            loop: Any = trainer.fit_loop
            checkpoint["validation_due"] = bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if not trainer.training:
            return
        progress = checkpoint["loops"]["fit_loop"]
        then = checkpoint["callbacks"].get(self.state_key, {}).get("accumulation")
        if then not in (None, trainer.accumulate_grad_batches):
            _recut(progress, then, trainer.accumulate_grad_batches)
        if trainer.enable_validation and checkpoint.get("validation_due"):
            # Lightning takes up a validation that had begun, but skips one that was about to; so this one "had begun".
            for counts in progress["epoch_loop.batch_progress"].values():
                if isinstance(counts, dict):
                    counts["completed"] = counts["processed"]
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress["epoch_loop.val_loop.batch_progress"] |= {"total": begun, "current": dict.fromkeys(begun, 0)}

    @property
    @override
    def state_key(self) -> str:
        return "RunCheckpoint"  # the same for a subclass

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"random_states": self._random_states, "accumulation": self._accumulation}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random_states = state_dict["random_states"]

    def _set_later_steps_aside(self, step: int) -> None:
        """What another run, or this one on another way, left of later steps must not be taken for the newest."""
        later = [path for path in saved_steps(self.folder) if step_of(path) > step]
        kept: dict[Path, list[bytes]] = {}
        for file in (self.folder.parent / METRICS_FILE, self.folder.parent / SAMPLES_FILE):
            lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
            found = [re.match(rb'{"step": (\d+)', line) for line in lines]
            kept[file] = [line for line, at in zip(lines, found, strict=True) if at is None or int(at[1]) <= step]
            later += [file] if len(kept[file]) < len(lines) else []
        for path in later:
            names = (path.with_name(f"{path.name}.left-at-{step}.{number}") for number in itertools.count())
            aside = next(name for name in names if not name.exists())
            path.rename(aside)
            if path in kept:
                with telling(path):
                    path.write_bytes(b"".join(kept[path]))
            rank_zero_info(f"{path}: this run goes on from step {step}; set aside as {aside.name}.")

    def _take_up_best(self, step: int) -> None:
        """Goes on from the best steps before this one, of the same metric; without a metric they stay as they are."""
        found = BestSteps.read(self.folder)
        kept = found.among(lambda number: number <= step)
        is_same = self.monitor is None or (found.monitor, found.mode) == (self.best.monitor, self.best.mode)
        self.best = kept if is_same else BestSteps(self.best.monitor, self.best.mode)
        if self.best != found and (self.folder / BEST_FILE).exists():
            with telling(self.folder / BEST_FILE):
                self.best.write(self.folder)

    def _save(self, trainer: Trainer) -> None:
        target = step_folder(self.folder, trainer.global_step)
        if self.saved == target or _is_trial(trainer):
            return
        self._random_states = gather_over_ranks(random_state(), trainer)

        def write() -> None:
            try:
                trainer.save_checkpoint(target)
            except CheckpointError:
                trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other processes wait for this one
                raise

        try:
            by_all(write, trainer)
        except CheckpointError as error:
            if self.if_saving_fails == "stop":
                raise
            rank_zero_warn(f"{error}\nGoing on without it, as checkpoint.if_saving_fails says.")
            self._unsaved = error
        else:
            self.saved, self._unsaved = target, None
            self._prune(trainer)
        self._saved_at = time.monotonic()

    def _prune(self, trainer: Trainer) -> None:
        """Reads each checkpoint once in a run, as far as ``keep`` asks for; parts are shared out over processes."""
        share = (trainer.global_rank, trainer.world_size) if sharding_of(trainer) is not None else (0, 1)
        reads = trainer.is_global_zero or share[1] > 1
        steps = trainer.strategy.broadcast(saved_steps(self.folder))[-self.keep :]
        for folder in [step for step in steps if step not in self._whole]:
            try:
                by_all(partial(verify_checkpoint, folder, share) if reads else dict, trainer)
                self._whole.add(folder)
            except CheckpointError as error:
                rank_zero_warn(f"{error} It does not count as a checkpoint to keep.")
        try:
            if trainer.is_global_zero:
                prune(self.folder, self.keep, self._whole.__contains__, self.best.step)
        except OSError as error:
            rank_zero_warn(f"{self.folder}: an old checkpoint could not be removed ({error.strerror}).")

    def _leave(self, trainer: Trainer, asked: signal.Signals) -> None:
        if asked == signal.SIGUSR1 and trainer.is_global_zero:
            requeue_slurm_job()
        where = str(self.saved or "no checkpoint")
        if self.saved != step_folder(self.folder, trainer.global_step):
            where += " (that of this step could not be written)"
        raise PreemptedError(asked, trainer.global_step, where)


def _is_trial(trainer: Any) -> bool:
    return bool(trainer.fast_dev_run)  # which writes nothing


def run_folder_of(trainer: Trainer) -> Path | None:
    """Where a run's own files go, whatever logs it; a broadcast, which every process has to ask for."""
    log_dir = trainer.log_dir if trainer.loggers else None
    saving = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoint)]
    if _is_trial(trainer) or not (saving or log_dir):
        return None
    return saving[0].folder.parent if saving else Path(str(log_dir))


def _recut(progress: dict[str, Any], then: int, now: int) -> None:
    """Counts Lightning's micro-batches anew where the same steps are now cut into more or fewer of them.

    Every count but that of completed batches, which Lightning raises a moment later, is a whole number of steps.
    """
    batches = progress["epoch_loop.batch_progress"]
    for counts in (batches["total"], batches["current"]):
        behind = counts["ready"] - counts["completed"]
        for name in ("ready", "started", "processed"):
            counts[name] = counts[name] // then * now
        counts["completed"] = counts["ready"] - behind


def _require_one_step(trainer: Trainer) -> None:
    steps = sorted(set(gather_over_ranks(trainer.global_step, trainer)))
    if len(steps) > 1:
        problem = f"expected one step for all processes to go on from, found {', '.join(map(str, steps))}."
        raise CheckpointError("ckpt_path", problem, "Give a run_folder that all nodes see.")


def _require_one_folder(folder: Path, trainer: Trainer) -> None:
    """Each process is to write its part of a checkpoint: hours of training should not come before that fails."""
    sign = folder / f".written-by-{os.getpid()}"
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        sign.touch()
    seen = gather_over_ranks(trainer.strategy.broadcast(sign).exists(), trainer)
    if trainer.is_global_zero:
        sign.unlink()
    if not all(seen):
        problem = f"expected a folder that all processes see, found that {seen.count(False)} of {len(seen)} do not."
        raise CheckpointError(str(folder), problem, "Give a run_folder on a file system of all nodes.")
