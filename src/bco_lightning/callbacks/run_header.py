"""What a fit is about to do, in a few lines before its first step, and as hyper-parameters that compare across runs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from typing_extensions import override

from bco_lightning.callbacks.loggers import show, telling
from bco_lightning.callbacks.refusals import names_logged
from bco_lightning.callbacks.run_checkpoint import run_folder_of
from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.data.datamodule import FeedbackDataModule
from bco_lightning.errors import LanguageModelError
from bco_lightning.figures import weight_histogram
from bco_lightning.importance.report import TrustReport, print_trust, trust_rows
from bco_lightning.models.build import dtype_of_matrices
from bco_lightning.models.layout import causal_lm_of, kind_of_model
from bco_lightning.models.log_probs import tile_for
from bco_lightning.models.memory import SHARE_TAKEN, PlanOptions, memory_of, tokens_within
from bco_lightning.options import LoraSettings
from bco_lightning.parallel.collectives import max_over_ranks
from bco_lightning.parallel.sharding import copies_of_parameters, sharding_of

if TYPE_CHECKING:
    from bco_lightning.module import BCOModule

_COMPARED = (
    "name_or_path", "objective", "beta", "learning_rate", "lr_schedule", "warmup_ratio", "weight_decay", "optimizer",
    "dtype", "class_weights", "importance_weights", "reward_shift_decay", "kl_budget", "seed",
)  # fmt: skip
_OF_TRUST = ("log_loss", "constant_log_loss", "effective_share", "mass", "at_low", "at_high", "auc", "matched_auc")
_MOST_ON_CPU = 4096  # tokens of a micro-batch: more is no quicker
_GIB, _ROWS = 2**30, {"train": "to train on", "validation": "held out"}


class RunHeader(Callback):
    """Before the first step: says what is trained on what and where; tells loggers :func:`hyper_parameters`.

    TensorBoard compares runs by them under HPARAMS, beside the newest ``val/auroc`` and ``val/loss``. How far
    importance weights can be trusted is printed, logged as ``importance/...`` and written into ``importance.json``.
    """

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit" or trainer.fast_dev_run:
            return
        values, known = hyper_parameters(trainer, pl_module), names_logged(trainer)
        results = {name: 0.0 for name in ("val/auroc", "val/loss", "train/loss") if name in known}
        for logger in trainer.loggers if trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):  # which would log made-up results with them
                from torch.utils.tensorboard.summary import hparams

                logger.log_hyperparams(values, {})
                for told in hparams(values, results)[:2]:
                    logger.experiment.file_writer.add_summary(told)
            else:
                logger.log_hyperparams(values)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        folder = run_folder_of(trainer)  # a broadcast: every process has to ask
        data, steps, sizes = getattr(trainer, "datamodule", None), pl_module.num_steps(), Counter[bool]()
        for each in pl_module.policy.parameters():
            sizes[each.requires_grad] += each.numel()
        share, (up, down) = f"({sizes[True] / sizes.total():.2%})", pl_module.class_weights
        rows, of_rows, memory = "", "", "not known"
        if isinstance(data, FeedbackDataModule):
            counts = [each for each in data.counts if each.name in _ROWS]
            rows = "".join(f"{each.up:,} up and {each.down:,} down {_ROWS[each.name]}; " for each in counts)
            of_rows = f" of {data.rows_per_step:,} rows, epochs: {steps / data.steps_per_epoch:.3g}"
            memory = expected_memory(pl_module, data)
            looks_once = str(trainer.val_check_interval) == "1.0" and steps <= data.steps_per_epoch  # 1 is every batch
            if pl_module.options.kl_budget and looks_once:
                told = "it is looked at once, when the run ends; trainer.val_check_interval: 0.1 looks ten times"
                rank_zero_warn(f"model.kl_budget: {told}.")
        rank_zero_info(
            f"policy: {pl_module.options.name_or_path}, {sizes[True]:,} of {sizes.total():,} parameters trained "
            f"{share}, weights in {next(pl_module.policy.parameters()).dtype}\n"
            f"rows: {rows}class weights: up {up:.3f}, down {down:.3f}\n"
            f"steps: {steps:,} optimizer steps{of_rows}; {pl_module.said_of_rows}\n"
            f"device: {trainer.world_size} × {trainer.strategy.root_device.type}, precision {trainer.precision}\n"
            f"memory: {memory}\nrun: {folder or 'nothing is written'}"
        )
        if trainer.max_steps > steps:
            rank_zero_info(f"trainer.max_epochs: {trainer.max_epochs} ends the run before trainer.max_steps does")
        if pl_module.importance is not None and trainer.is_global_zero:
            show_trust(trainer, pl_module.importance.report, folder)


def show_trust(trainer: Trainer, report: TrustReport, folder: Path | None) -> None:
    """Prints, logs and writes a trust report, and shows the histogram of weights; no text of a prompt."""
    step = trainer.global_step
    print_trust(report, Console())
    known = {name: getattr(report, name) for name in _OF_TRUST}
    numbers = {f"importance/{name}": getattr(n, "value", n) for name, n in known.items() if n is not None}
    for logger in trainer.loggers:
        logger.log_metrics(dict(numbers), step=step)
    if report.has_evidence:
        show("figure", trainer.loggers, "importance/weights", weight_histogram(report.histogram), step)
    rows = [("verdict", report.verdict), *(("warning", text) for text in report.warnings), *trust_rows(report)]
    show("table", trainer.loggers, "importance/verdict", ("what", "value"), rows, step)
    if folder is not None:
        written = json.dumps(asdict(report), indent=2, allow_nan=False) + "\n"
        with telling(file := folder / "importance.json"), written_whole(file, replaces=True) as unfinished:
            unfinished.write_text(written, encoding="utf-8")


def hyper_parameters(trainer: Trainer, module: BCOModule) -> dict[str, Any]:
    """What of a run's options decides its numbers, flat, the same names for every run; 0 stands for none."""
    options, data = module.options, getattr(trainer, "datamodule", None)
    plain = options.plain()
    values = {f"model.{name}": plain[name] for name in _COMPARED}
    if (path := Path(options.name_or_path)).exists():  # where it lies is nobody's business
        values["model.name_or_path"] = path.resolve().name
    lora = options.lora.plain() if options.lora else dict.fromkeys(LoraSettings().plain(), 0)
    values |= {f"model.lora.{name}": value for name, value in lora.items()}
    values |= {"trainer.precision": str(trainer.precision), "trainer.gradient_clip_val": trainer.gradient_clip_val}
    values["steps"] = module.num_steps()
    if isinstance(data, FeedbackDataModule):
        values |= {"rows": data.training.row_set.counts.used, "rows_per_step": data.rows_per_step}
        values |= {f"data.{name}": getattr(data.options, name) for name in ("max_length", "balanced_sampling")}
    return {name: 0 if v is None else str(v) if isinstance(v, list) else v for name, v in values.items()}


def expected_memory(module: BCOModule, data: FeedbackDataModule) -> str:
    """What a step takes by the formula of ``plan``, in words, were all rows as long as the longest."""
    lengths, size, most = data.training.lengths, data.options.batch_size, data.tokens_per_micro_batch
    longest = int(lengths.max()) if lengths is not None else data.options.max_length
    told = f"{size} rows of {longest:,} tokens"
    if isinstance(most, int):
        longer = "" if lengths is None else f" ({np.count_nonzero(lengths > most):,} rows are longer, and alone)"
        told = f"at most {most:,} tokens a micro-batch{longer}"
        size, longest = 1, max(longest, most)
    try:
        parts = memory_of(*_plan(module, size, longest))
    except LanguageModelError:
        return "not known for this kind of model"
    return f"about {sum(parts.values()) / _GIB:.2g} GiB on each device at the peak of a step of {told}"


def tokens_that_fit(module: BCOModule) -> int:
    """Tokens of a micro-batch with which a step takes four fifths of the memory that is left to each process."""
    trainer, device = module.trainer, module.trainer.strategy.root_device
    memory, most = psutil.virtual_memory().available / trainer.num_devices, _MOST_ON_CPU
    if device.type == "cuda":
        memory, most = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device), sys.maxsize
    found = min(most, tokens_within(SHARE_TAKEN * memory, *_plan(module, 1, 256)))
    return max(1, -int(max_over_ranks(torch.tensor(-found), trainer)))


def _plan(module: BCOModule, batch_size: int, length: int) -> tuple[PlanOptions, tuple[int, int], Any]:
    options, trainer = module.options, module.trainer
    asked = PlanOptions(
        model=options.name_or_path, gpus=trainer.world_size // copies_of_parameters(trainer),
        strategy="ddp" if sharding_of(trainer) is None else "fsdp2", lora_r=options.lora.r if options.lora else 0,
        dtype="bfloat16" if dtype_of_matrices(module.policy) == torch.bfloat16 else "float32",
        precision="bf16-mixed" if "mixed" in str(trainer.precision) else "32-true",
        optimizer="adamw_8bit" if options.optimizer == "paged_adamw_8bit" else options.optimizer,
        reference="none" if module.reference.own_model is None else "model",
        batch_size=batch_size, max_length=max(2, length), gradient_checkpointing=options.gradient_checkpointing,
    )  # fmt: skip
    with torch.device("meta"):
        model = kind_of_model(config := causal_lm_of(module.policy).config).from_config(config)
    return asked, tile_for(trainer.strategy.root_device), model
