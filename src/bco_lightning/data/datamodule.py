"""The data module: feedback logs in, seeded batches of unpaired rated completions out."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from bco_lightning.batch import FeedbackBatch
from bco_lightning.data.collation import pack_rows
from bco_lightning.data.feedback_row import Columns
from bco_lightning.data.loading import BadRowPolicy, BadRows, RowLoader
from bco_lightning.data.once_per_node import read_once_per_node
from bco_lightning.data.row_counts import FeedbackSummary, RowCounts
from bco_lightning.data.row_table import RowSet, RowTable, held_out_prompts
from bco_lightning.data.sampling import EvenBatchSampler, RowOrder, StepBatchSampler
from bco_lightning.data.tokenization import RowTokenizer, TooLong, chosen_template
from bco_lightning.distributed import errors_of_all, sharding_of
from bco_lightning.errors import ConfigError, FaultError, FeedbackRowError
from bco_lightning.seeding import chosen_seed


class FeedbackDataModule(LightningDataModule):
    """Streams thumbs-up / thumbs-down rows as packed micro-batches.

    Training rows come in a new seeded order on every pass. An epoch is ``ceil(rows / rows per step)`` optimizer steps;
    where rows do not divide, its last step takes its missing rows from the next pass, so nothing is left out.

    Args:
        train_files: Feedback logs: ``.jsonl``, ``.csv``, ``.parquet``, ``package:NAME/path``, ``hub:OWNER/NAME@SPLIT``.
        validation_files: Held-out logs. If left out, ``validation_fraction`` of the training prompts is held out.
        test_files: Logs for ``test``; the validation rows if left out.
        predict_files: Logs for ``predict``; they need no labels.
        batch_size: Rows of a micro-batch on each device.
        max_length: Limit of prompt and completion together, in tokens.
        too_long: ``cut`` rows over the limit, or ``drop`` them. Both are counted and shown.
        chat_template: ``None`` for the tokenizer's own, ``plain`` for a base model, or a Jinja file.
        validation_fraction: Share of the distinct training prompts to hold out when there are no validation files;
            a prompt is never on both sides.
        balanced_sampling: Draw as many thumbs-up as thumbs-down into every step, the rarer class more often.
        group_by_prompt: Keep rows with one prompt next to each other and compute their prompt once in a micro-batch,
            where rows are packed. Steps then hold fewer distinct prompts.
        columns: Names of the columns.
        seed: Seed of the row order and the validation split; that of ``seed_everything`` if left out.
        num_workers: Worker processes of each data loader.
        bad_rows: ``strict`` stops at the first malformed row; ``skip`` leaves them out, counts and shows them.
        max_bad_rows: Share of the rows read, of each data set, above which ``skip`` stops too.
        tokenizer: A tokenizer, for use without a :class:`BCOModule`; else the module's own is taken.

    Raises:
        FeedbackRowError: On a missing source, a malformed row, or if there is only one class to train on.
    """

    def __init__(
        self,
        train_files: list[str] | str | None = None,
        validation_files: list[str] | str | None = None,
        test_files: list[str] | str | None = None,
        predict_files: list[str] | str | None = None,
        batch_size: int = 8,
        max_length: int = 1024,
        too_long: TooLong = "cut",
        chat_template: str | None = None,
        validation_fraction: float = 0.1,
        balanced_sampling: bool = False,
        group_by_prompt: bool = False,
        columns: Columns | None = None,
        seed: int | None = None,
        num_workers: int = 0,
        bad_rows: BadRowPolicy = "strict",
        max_bad_rows: float = 0.001,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError("data.batch_size", f"expected at least 1 row, found {batch_size}.")
        if not 0 <= validation_fraction < 1:
            raise ConfigError(
                "data.validation_fraction", f"expected a share from 0 to below 1, found {validation_fraction}."
            )
        if not 0 <= max_bad_rows <= 1:
            raise ConfigError("data.max_bad_rows", f"expected a share from 0 to 1, found {max_bad_rows}.")
        if balanced_sampling and group_by_prompt:
            raise ConfigError(
                "data.group_by_prompt",
                "expected false with balanced_sampling, which draws the classes apart from each other; found true.",
            )
        self.bad_rows, self.max_bad_rows = bad_rows, max_bad_rows
        self.group_by_prompt = group_by_prompt
        self.train_files, self.validation_files = _as_list(train_files), _as_list(validation_files)
        self.test_files, self.predict_files = _as_list(test_files), _as_list(predict_files)
        self.batch_size, self.max_length, self.too_long = batch_size, max_length, too_long
        self.chat_template, self.validation_fraction = chat_template, validation_fraction
        self.balanced_sampling, self.columns, self.seed = balanced_sampling, columns or Columns(), chosen_seed(seed)
        self.num_workers = num_workers
        self._tokenizer = tokenizer
        self._row_sets: dict[str, RowSet] = {}  # in the order in which they were read
        self.feedback_summary: FeedbackSummary | None = None
        # A process may have no row of a small evaluation set.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @property
    def train_dataset(self) -> Dataset | None:
        """Rows to train on; ``None`` before ``setup`` has read them, as with those below."""
        return self._dataset("train")

    @property
    def validation_dataset(self) -> Dataset | None:
        """Rows of the validation files, or those held out from training."""
        return self._dataset("validation")

    @property
    def test_dataset(self) -> Dataset | None:
        """Rows of the test files."""
        return self._dataset("test")

    @property
    def predict_dataset(self) -> Dataset | None:
        """Rows to score."""
        return self._dataset("predict")

    @property
    def counts(self) -> list[RowCounts]:
        """What became of the rows of each data set, in the order in which they were read."""
        return [row_set.counts for row_set in self._row_sets.values()]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer given, or the module's."""
        if self._tokenizer is not None:
            return self._tokenizer
        if self.trainer is None:
            raise ConfigError(
                "FeedbackDataModule", "expected a tokenizer or a trainer with a BCOModule, found neither."
            )
        return self.trainer.lightning_module.tokenizer

    @property
    def row_tokenizer(self) -> RowTokenizer:
        """Tokenizes one row by this module's options."""
        return RowTokenizer(self.tokenizer, self.max_length, self.too_long, self.chat_template)

    @property
    def class_frequencies(self) -> tuple[float, float]:
        """Shares of thumbs-up and thumbs-down among the rows that a step draws."""
        if self.balanced_sampling:
            return 0.5, 0.5
        num_up, num_down = self._class_counts
        share_up = num_up / (num_up + num_down)
        return share_up, 1 - share_up

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all processes and accumulated micro-batches."""
        trainer = self.trainer
        return self.batch_size * self._accumulation * (trainer.world_size if trainer else 1)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every training row at least once; with balanced sampling, the rarer class again."""
        if not self.balanced_sampling:
            return math.ceil(len(self._trained_on) / self.rows_per_step)
        return math.ceil(2 * max(self._class_counts) / self.rows_per_step)

    def setup(self, stage: Literal["fit", "validate", "test", "predict"] | str | None = None) -> None:
        """Reads and tokenizes what ``stage`` needs, and prints what became of the rows.

        Of several processes the first one of each node reads; the others wait, however long it takes, and map its
        files. What one of them raises, all raise.

        Raises:
            FeedbackRowError: As said above, or if a node has other rows than the first node.
            ConfigError: If there are no files for this stage.
        """
        if self.trainer is None or self.trainer.world_size == 1:
            self._read(stage)
            return
        _refuse_injected_sampler(self.trainer)
        told = read_once_per_node(lambda: self._told(stage), self.trainer)
        faults: list[FaultError] = []
        if self.trainer.local_rank > 0:
            self.feedback_summary = told["feedback"] and FeedbackSummary(**told["feedback"])
            try:
                self._row_sets = {name: RowSet.shared(row_set) for name, row_set in told["row_sets"].items()}
            except FaultError as fault:
                faults.append(fault)
        for error in errors_of_all(faults, self.trainer):
            raise error

    def train_dataloader(self) -> DataLoader[FeedbackBatch]:
        """Micro-batches of this rank, from the trainer's current optimizer step on."""
        trainer = self.trainer
        if trainer is not None:
            _refuse_shortened_epochs(trainer)
        sampler = StepBatchSampler(
            self._row_order(),
            batch_size=self.batch_size,
            accumulation=self._accumulation,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            steps_per_epoch=self.steps_per_epoch,
            current_step=lambda: trainer.global_step if trainer else 0,
            lengths=self.train_lengths if self._is_padded else None,
        )
        return self._loader(self._trained_on, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader[FeedbackBatch] | list[Any]:
        """The held-out rows of this rank, each once, in file order; empty if nothing is held out."""
        _require_rows_for_all(self.validation_dataset, self.trainer)
        return self._evaluation_loader(self.validation_dataset)

    def test_dataloader(self) -> DataLoader[FeedbackBatch] | list[Any]:
        """The test rows, or the held-out rows where no test files were given."""
        dataset = self.test_dataset or self.validation_dataset
        _require_rows_for_all(dataset, self.trainer)
        return self._evaluation_loader(dataset)

    def predict_dataloader(self) -> DataLoader[FeedbackBatch] | list[Any]:
        """The rows to score."""
        if self.trainer is not None and sharding_of(self.trainer) is not None:
            _require_rows_for_all(self.predict_dataset, self.trainer, "data.predict_files")
        return self._evaluation_loader(self.predict_dataset)

    def datasets_of(self, stage: str) -> dict[str, Dataset]:
        """What a stage (``fit``, ``validate``, ``test`` or ``predict``) runs on, by Lightning's name of each run."""
        trainer: Any = self.trainer
        held_out = self.validation_dataset
        found = {
            "fit": {"train": self.train_dataset, "validate": held_out if trainer.enable_validation else None},
            "validate": {"validate": held_out},
            "test": {"test": self.test_dataset or held_out},
            "predict": {"predict": self.predict_dataset},
        }[stage]
        return {name: dataset for name, dataset in found.items() if dataset is not None}

    def state_dict(self) -> dict[str, Any]:
        """How a step is cut into micro-batches; the position itself is the trainer's step."""
        return {} if self.train_dataset is None else {"accumulation": self._accumulation}

    def fingerprints(self) -> dict[str, Any]:
        """What the rows and their order depend on; the module compares it before a run goes on."""
        if self.train_dataset is None:
            return {}
        return {
            "seed": self.seed,
            "rows_per_step": self.rows_per_step,
            "balanced_sampling": self.balanced_sampling,
            "max_length": self.max_length,
            "too_long": self.too_long,
            "rows": len(self.train_dataset),
            "row_digest": self._row_sets["train"].digest,
            "chat_template": chosen_template(self.tokenizer, self.chat_template),
            **({"group_by_prompt": True} if self.group_by_prompt else {}),
        }

    def _told(self, stage: str | None) -> dict[str, Any]:
        """Reads, and says in plain values what the other processes of this node have to know."""
        self._read(stage)
        row_sets = {name: row_set.told() for name, row_set in self._row_sets.items()}
        return {"row_sets": row_sets, "feedback": self.feedback_summary and asdict(self.feedback_summary)}

    def _read(self, stage: str | None) -> None:
        if stage in ("fit", None) and self.train_dataset is None:
            self._setup_training()
        if stage == "test" and self.test_files:
            if self.test_dataset is None:
                self._read_all("test", self.test_files)
        elif stage in ("validate", "test") and self.validation_dataset is None:
            self._setup_validation()
        if stage == "predict" and self.predict_dataset is None:
            if not self.predict_files:
                raise ConfigError("data.predict_files", "expected files to score, found none.")
            self._read_all("predict", self.predict_files, labelled=False)

    @property
    def _accumulation(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer is not None else 1

    @property
    def _is_padded(self) -> bool:
        return self.trainer is not None and getattr(self.trainer.lightning_module, "layout", "packed") == "padded"

    @property
    def train_lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of each training row."""
        return np.asarray(pc.list_value_length(self._trained_on.data.column("input_ids")))

    def _dataset(self, name: str) -> Dataset | None:
        return self._row_sets[name].dataset if name in self._row_sets else None

    @property
    def _class_counts(self) -> tuple[int, int]:
        """Thumbs-up and thumbs-down among the training rows."""
        num_rows, num_up = len(self._trained_on), self._row_sets["train"].counts.up
        return num_up, num_rows - num_up

    @property
    def _trained_on(self) -> Dataset:
        if self.train_dataset is None:
            raise _no_training_files()
        return self.train_dataset

    def _setup_validation(self) -> None:
        if self.validation_files:
            self._read_all("validation", self.validation_files)
        elif self.train_files:
            self._setup_training()
        if self.validation_dataset is None:
            raise ConfigError("data.validation_files", "expected files to evaluate on, found none.")

    def _setup_training(self) -> None:
        if not self.train_files:
            raise _no_training_files()
        with self._table() as table:
            bad_rows, rows_of = self._load(self.train_files, table)
            self._show_feedback(FeedbackSummary.of(table.answer_keys, table.thumbs_up, rows_of))
            held_out = np.zeros(len(table), dtype=bool)
            if self.validation_files:
                self._read_all("validation", self.validation_files, table.prompt_keys)
            elif self.validation_fraction:
                held_out = held_out_prompts(table.prompt_keys, self.validation_fraction)
            row_sets = table.divide({"train": ~held_out, "validation": held_out})
        self._note_bad_rows(row_sets["train"].counts, bad_rows)
        self._keep(row_sets["train"])
        _require_both_classes(self._trained_on, self.train_files)
        if held_out.any():
            self._keep(row_sets["validation"])

    def _read_all(
        self, name: str, sources: list[str], trained_on: np.ndarray[Any, Any] | None = None, labelled: bool = True
    ) -> None:
        """Makes a data set of all rows of ``sources``."""
        with self._table() as table:
            bad_rows, _ = self._load(sources, table, labelled)
            if trained_on is not None:
                _note_shared_prompts(trained_on, table.prompt_keys)
            row_set = table.divide({name: np.ones(len(table), dtype=bool)})[name]
        self._note_bad_rows(row_set.counts, bad_rows)
        self._keep(row_set)

    def _table(self) -> RowTable:
        return RowTable(self.seed)

    def _load(self, sources: list[str], table: RowTable, labelled: bool = True) -> tuple[BadRows, dict[str, int]]:
        bad_rows = BadRows(self.bad_rows, self.max_bad_rows)
        return bad_rows, RowLoader(self.columns, self.row_tokenizer, bad_rows, labelled).load(sources, table)

    def _note_bad_rows(self, counts: RowCounts, bad_rows: BadRows) -> None:
        counts.read += bad_rows.count
        counts.malformed, counts.malformed_places = bad_rows.count, bad_rows.places

    def _show_feedback(self, summary: FeedbackSummary) -> None:
        self.feedback_summary = summary
        rank_zero_info(str(summary))

    def _keep(self, row_set: RowSet) -> None:
        counts = row_set.counts
        self._row_sets[counts.name] = row_set
        rank_zero_info(str(counts))
        if row_set.dataset is None:
            raise FeedbackRowError(
                counts.name,
                f"expected rows to use, found none ({counts.dropped} over data.max_length, "
                f"{counts.malformed} malformed).",
            )

    def _row_order(self) -> RowOrder:
        thumbs = _thumbs(self._trained_on)
        if not self.balanced_sampling:
            groups = _prompt_numbers(self._trained_on) if self.group_by_prompt else None
            return RowOrder([range(len(thumbs))], [self.rows_per_step], self.seed, groups)
        if self.batch_size % 2:
            raise ConfigError(
                "data.batch_size", f"expected an even number with balanced_sampling, found {self.batch_size}."
            )
        pools = [[row for row, up in enumerate(thumbs) if up is wanted] for wanted in (True, False)]
        return RowOrder(pools, [self.rows_per_step // 2] * 2, self.seed)

    def _evaluation_loader(self, dataset: Dataset | None) -> DataLoader[FeedbackBatch] | list[Any]:
        if dataset is None:
            return []
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return self._loader(dataset, batch_sampler=EvenBatchSampler(len(dataset), self.batch_size, rank, world_size))

    def _loader(self, dataset: Dataset, **arguments: Any) -> DataLoader[FeedbackBatch]:
        return DataLoader(
            dataset.select_columns(["row_id", "input_ids", "completion_mask", "thumbs_up"]),  # type: ignore[arg-type]
            collate_fn=partial(pack_rows, share_prompts=self.group_by_prompt),
            num_workers=self.num_workers,
            # Without its own, a loader draws from the global generator whenever it is iterated.
            generator=torch.Generator().manual_seed(self.seed),
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            **arguments,
        )


def _no_training_files() -> ConfigError:
    return ConfigError("data.train_files", "expected files to train on, found none.", "Set data.train_files.")


def _as_list(files: list[str] | str | None) -> list[str]:
    return [files] if isinstance(files, str) else list(files or [])


def _thumbs(dataset: Dataset) -> list[bool]:
    return list(dataset["thumbs_up"])


def _prompt_numbers(dataset: Dataset) -> np.ndarray[Any, Any]:
    """A number for each row's prompt, the same in every process, as ``hash`` would not be."""
    digests = (hashlib.blake2b(prompt.encode(), digest_size=8).digest() for prompt in dataset["prompt"])
    numbers = (int.from_bytes(digest, "big") for digest in digests)
    return np.fromiter(numbers, dtype=np.uint64, count=len(dataset))


def _require_rows_for_all(dataset: Dataset | None, trainer: Any, option: str = "data.validation_files") -> None:
    """Lightning passes over an evaluation in the processes that have no row of it, and the others wait for them."""
    if dataset is not None and trainer is not None and len(dataset) < trainer.world_size:
        raise ConfigError(
            option,
            f"expected a row for each of {trainer.world_size} processes, found {len(dataset)}.",
            "Give more rows, use fewer processes, or hold out none (data.validation_fraction: 0).",
        )


def _refuse_shortened_epochs(trainer: Any) -> None:
    if not trainer.fast_dev_run and (trainer.limit_train_batches not in (None, 1.0) or trainer.overfit_batches):
        raise ConfigError(
            "trainer.limit_train_batches",
            "expected whole epochs, since the row order is derived from the optimizer step; found a limit.",
            "Use trainer.max_steps to train for less than an epoch.",
        )


def _require_both_classes(dataset: Dataset, sources: list[str]) -> None:
    counts = Counter(_thumbs(dataset))
    if len(counts) < 2:
        only = "thumbs-up" if counts[True] else "thumbs-down"
        raise FeedbackRowError(
            ", ".join(sources),
            f"expected thumbs of both kinds to train on, found {len(dataset)} rows that are all {only}.",
            "A classifier needs both classes; for good examples alone use supervised fine-tuning.",
        )
    share = min(counts.values()) / len(dataset)
    if share < 0.2:
        rank_zero_info(
            f"Only {share:.0%} of the training rows are of the rarer class. model.class_weights: auto keeps the loss "
            "balanced; data.balanced_sampling: true also makes every step see both classes."
        )


def _note_shared_prompts(trained_on: np.ndarray[Any, Any], held_out: np.ndarray[Any, Any]) -> None:
    shared = int(np.isin(held_out, trained_on).sum())
    if shared:
        rank_zero_info(f"{shared} of {len(held_out)} validation rows have a prompt that is trained on too.")


def _refuse_injected_sampler(trainer: Any) -> None:
    if trainer._accelerator_connector.use_distributed_sampler:
        raise ConfigError(
            "trainer.use_distributed_sampler",
            "expected false with more than one process, found true.",
            "The data module gives each process its own rows; Lightning's sampler would repeat some.",
        )
