"""``python -m bco_lightning inspect``: what a config's data looks like, before GPU hours are spent on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bco_lightning.data import FeedbackDataModule
from bco_lightning.errors import ConfigError, FeedbackRowError, UserError
from bco_lightning.importance.report import TrustReport
from bco_lightning.importance.weights import MOST_PROMPTS
from bco_lightning.inspection.cost import Cost, cost_of, machine_of, num_steps, work_of_epoch
from bco_lightning.inspection.data_report import DataReport, Finding, make_report
from bco_lightning.inspection.page import write_page
from bco_lightning.inspection.rows import RowArrays
from bco_lightning.inspection.terminal import print_report
from bco_lightning.models.load import load_tokenizer
from bco_lightning.module import BCOModule
from bco_lightning.options import LoraSettings


@dataclass(frozen=True)
class InspectOptions:
    """What ``inspect`` takes beside the options of ``fit``.

    Args:
        report: The page to write, which needs no other file.
        examples: Rows of either class to show.
        hide_examples: Show no row's text, neither here nor on the page.

    Raises:
        ConfigError: If an option is out of range, or the page cannot be a file.
    """

    report: str = "inspect.html"
    examples: int = 3
    hide_examples: bool = False

    def __post_init__(self) -> None:
        if self.examples < 0:
            raise ConfigError("--examples", f"expected a number from 0 on, found {self.examples}.")
        page = Path(self.report)
        if page.is_dir() or not page.parent.is_dir():
            found = "a folder" if page.is_dir() else "no such folder"
            raise ConfigError("--report", f"expected a file to write in a folder that exists, found {found}.")


def inspect_command(
    options: InspectOptions, config: Any, data_options: Mapping[str, Any], model_options: Mapping[str, Any]
) -> None:
    """Reads, reports to the terminal, and writes the page.

    Args:
        options: Those of ``inspect``.
        config: The resolved options of ``fit``.
        data_options: Arguments of :class:`FeedbackDataModule`.
        model_options: Arguments of :class:`BCOModule`, which is only made where importance weights are wanted.

    Raises:
        UserError: Where ``fit`` would not start either; if the rows could be read, after the report.
    """
    module = BCOModule(**model_options)
    data = FeedbackDataModule(**data_options, tokenizer=load_tokenizer(config.model.name_or_path))
    problem: UserError | None = _read(data)
    notes = []
    if problem is not None:
        notes.append(Finding("problem", f"fit would not start: {problem.problem}"))
    dataset = data.training_rows(data.streaming_sample or MOST_PROMPTS)
    trust = None
    if config.model.importance_weights != "off":
        weights = module.find_importance(data)
        trust, refused = weights.report, weights.problem(config.model.importance_weights)
        if refused is not None:
            problem = problem or refused
            notes.append(Finding("problem", f"fit would not start: {refused.problem}"))
    if data.streaming:
        notes.append(
            Finding("note", f"A stream: all but the counts is about {len(dataset):,} rows drawn evenly from it.")
        )
    report = _report(data, dataset, config, options, tuple(notes), trust)
    print_report(report, Console())
    write_page(report, Path(options.report))
    print(f"\nPage   {options.report}")
    if problem is not None:
        raise problem


def _read(data: FeedbackDataModule) -> FeedbackRowError | None:
    """Reads the rows; an error that comes after they are there is handed back."""
    try:
        data.setup("fit")
    except FeedbackRowError as error:
        if data.train_dataset is None:
            raise
        return error
    return None


def _report(
    data: FeedbackDataModule,
    dataset: Any,
    config: Any,
    options: InspectOptions,
    notes: tuple[Finding, ...],
    trust: TrustReport | None,
) -> DataReport:
    arrays = RowArrays.of(dataset)
    limits = {f"data.{name}": config.data.get(name) for name in ("max_length", "max_prompt_length")}
    return make_report(
        data,
        dataset,
        model=config.model.name_or_path,
        limits={name: limit for name, limit in limits.items() if limit is not None},
        arrays=arrays,
        cost=_cost(data, config, arrays),
        num_examples=0 if options.hide_examples else options.examples,
        notes=notes,
        trust=trust,
    )


def _cost(data: FeedbackDataModule, config: Any, arrays: RowArrays) -> Cost:
    lora = LoraSettings(**dict(vars(config.model.lora))) if config.model.lora is not None else None
    trainer = vars(config.trainer)
    machine = machine_of(trainer, config.model.dtype, lora)
    accumulation = trainer.get("accumulate_grad_batches")
    micro_batches = machine.num_devices * (accumulation if isinstance(accumulation, int) else 1)
    # The data module knows of no trainer here: its steps are micro-batches of one device.
    steps_per_epoch = -(-data.steps_per_epoch // micro_batches)
    rows_per_step = data.batch_size * micro_batches
    return cost_of(
        work_of_epoch(
            arrays.lengths, arrays.loss_tokens, arrays.thumbs_up, data.class_frequencies[0],
            steps_per_epoch * rows_per_step,
        ),
        config.model.name_or_path, lora, machine,
        rows_per_step=rows_per_step, steps_per_epoch=steps_per_epoch, steps=num_steps(trainer, steps_per_epoch),
    )  # fmt: skip
