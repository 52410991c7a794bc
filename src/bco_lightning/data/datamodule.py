"""The data module: feedback logs in, seeded batches of unpaired rated completions out."""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from bco_lightning.batch import FeedbackBatch
from bco_lightning.data.collate import collate
from bco_lightning.data.conflicts import Conflicts
from bco_lightning.data.feedback_row import Columns
from bco_lightning.data.loading import BadRowPolicy
from bco_lightning.data.once_per_node import read_once_per_node
from bco_lightning.data.reading import ReadingOptions, RowReader
from bco_lightning.data.remote import public_name
from bco_lightning.data.row_cache import ReadRows, RowCache
from bco_lightning.data.row_counts import FeedbackSummary, RowCounts
from bco_lightning.data.row_table import RowSet, RowTable
from bco_lightning.data.sampling import EvenBatchSampler, StepBatchSampler, StepOrder
from bco_lightning.data.source import FormatName, LossOn, Rating, RowFormat, Source, chosen_rating
from bco_lightning.data.streaming import StreamDataset, StreamedRows
from bco_lightning.data.table_rows import TableRows
from bco_lightning.data.tokenize import LengthLimits, LongCompletions, LongPrompts, RowTokenizer, chosen_template
from bco_lightning.errors import ConfigError, FaultError, FeedbackRowError
from bco_lightning.options import chosen_seed
from bco_lightning.parallel.collectives import errors_of_all
from bco_lightning.parallel.sharding import sharding_of
from bco_lightning.places import cache_root

# Columns that batches are made of; those at the end are there once they are known.
_OF_BATCHES = (
    "row_id", "input_ids", "completion_mask", "thumbs_up", "source", "prompt_key",
    "reference_log_prob", "importance_weight",
)  # fmt: skip
# Among row sets that are told, the rows of a stream.
_STREAM = "stream"
_log = logging.getLogger("lightning.pytorch")


class FeedbackDataModule(LightningDataModule):
    """Streams thumbs-up / thumbs-down rows as packed micro-batches.

    Training rows come in a new seeded order on every pass. An epoch is ``ceil(rows / rows per step)`` optimizer steps;
    where rows do not divide, its last step takes its missing rows from the next pass, so nothing is left out.

    Args:
        train_files: Feedback logs: files, globs, URLs such as ``s3://bucket/*.jsonl``, ``package:NAME/path``,
            ``hub:OWNER/NAME@SPLIT``; or a :class:`Source` for each, with a name, a weight and a format of its own.
        validation_files: Held-out logs. If left out, ``validation_fraction`` of the training prompts is held out.
        test_files: Logs for ``test``; the validation rows if left out.
        predict_files: Logs for ``predict``; they need no labels.
        batch_size: Rows of a micro-batch on each device.
        format: What the records are; ``auto`` goes by the first one of each source.
        columns: Names of the columns.
        rating: The rule that makes thumbs of numbers, or ``helpsteer2``; without one, labels are thumbs.
        loss_on: ``rated_turn`` trains on the last assistant turn, ``all_turns`` on each of the conversation.
        conflicts: What becomes of answers with thumbs of both kinds, to train on: ``keep`` all rows, ``drop`` all,
            keep those of the ``majority``, or those that agree with the ``last`` one.
        max_length: Limit of prompt and completion together, in tokens.
        max_prompt_length: Limit of the prompt in tokens; if left out, what the completion leaves, and at least half.
        long_prompts: ``keep_end`` cuts a prompt over its limit on the left (a leading system message stays),
            ``keep_start`` on the right, ``drop`` leaves the row out.
        long_completions: ``cut`` cuts a completion over the limit, which then gets no end token; ``drop`` leaves the
            row out.
        chat_template: ``None`` for the tokenizer's own, ``plain`` for a base model, or a Jinja file.
        validation_fraction: Share of the distinct training prompts to hold out when there are no validation files;
            a prompt is never on both sides.
        balanced_sampling: Draw as many thumbs-up as thumbs-down into every micro-batch, the rarer class more often.
        group_by_prompt: Keep rows with one prompt next to each other and compute their prompt once in a micro-batch,
            where rows are packed. Steps then hold fewer distinct prompts.
        seed: Seed of the row order and the validation split; that of ``seed_everything`` if left out.
        num_workers: Worker processes of each data loader.
        bad_rows: ``strict`` stops at the first malformed row; ``skip`` leaves them out, counts and shows them.
        max_bad_rows: Share of the rows read, of each data set, above which ``skip`` stops too.
        streaming: Leave training rows in their files and read them as steps need them: for JSON lines, Parquet and
            Arrow folders that are larger than memory or disk. Nothing is held out; give ``validation_files``.
        streaming_sample: Rows to read before the first step, for class weights and counts; all of them if left out,
            without keeping any.
        shuffle_buffer: Rows of a stream that are mixed with each other; those of a step come from all over the files.
        cache_rows: Keep tokenized rows on disk, so that the next start with the same logs, options and tokenizer finds
            them. They hold what users wrote; what nobody used for 30 days is removed.
        cache_folder: Where they are kept; else ``BCO_CACHE`` in the environment, else ``~/.cache/bco_lightning``.
        tokenizer: A tokenizer, for use without a :class:`BCOModule`; else the module's own is taken.

    Raises:
        FeedbackRowError: On a missing source, a malformed row, or if there is only one class to train on.
    """

    def __init__(
        self,
        train_files: list[str | Source] | str | None = None,
        validation_files: list[str | Source] | str | None = None,
        test_files: list[str | Source] | str | None = None,
        predict_files: list[str | Source] | str | None = None,
        batch_size: int = 8,
        format: FormatName = "auto",  # noqa: A002 - the word that users expect
        columns: Columns | None = None,
        rating: Rating | str | None = None,
        loss_on: LossOn = "rated_turn",
        conflicts: Conflicts = "keep",
        max_length: int = 1024,
        max_prompt_length: int | None = None,
        long_prompts: LongPrompts = "keep_end",
        long_completions: LongCompletions = "cut",
        chat_template: str | None = None,
        validation_fraction: float = 0.1,
        balanced_sampling: bool = False,
        group_by_prompt: bool = False,
        seed: int | None = None,
        num_workers: int = 0,
        bad_rows: BadRowPolicy = "strict",
        max_bad_rows: float = 0.001,
        streaming: bool = False,
        streaming_sample: int | None = None,
        shuffle_buffer: int = 10_000,
        cache_rows: bool = True,
        cache_folder: str | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self.balanced_sampling, self.group_by_prompt = balanced_sampling, group_by_prompt
        self.streaming, self.streaming_sample, self.shuffle_buffer = streaming, streaming_sample, shuffle_buffer
        self.seed, self.batch_size, self.num_workers = chosen_seed(seed), batch_size, num_workers
        self.chat_template, self.validation_fraction = chat_template, validation_fraction
        self.limits = LengthLimits(max_length, max_prompt_length, long_prompts, long_completions)
        row_format = RowFormat(format, columns or Columns(), chosen_rating(rating), loss_on)
        self.reading = ReadingOptions(
            row_format, self.limits, chat_template, conflicts, bad_rows, max_bad_rows, self.seed
        )
        self.train_files = _sources(train_files, "train_files")
        self.validation_files = _sources(validation_files, "validation_files")
        self.test_files = _sources(test_files, "test_files")
        self.predict_files = _sources(predict_files, "predict_files")
        self._refuse_what_does_not_fit()
        self._training: TableRows | StreamedRows | None = None
        self._stream: StreamDataset | None = None
        self._known_order: tuple[int, StepOrder] | None = None
        self._cache = RowCache(cache_root(cache_folder) / "tokenized_rows") if cache_rows else None
        self._tokenizer = tokenizer
        self.with_words = False  # the module asks for what its encoder of prompts needs of a stream
        self._row_sets: dict[str, RowSet] = {}  # in the order in which they were read
        self.feedback_summary: FeedbackSummary | None = None
        # A process may have no row of a small evaluation set.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def _refuse_what_does_not_fit(self) -> None:
        """Looks at every option before anything is read.

        Raises:
            ConfigError: If one is out of range, or two do not go together.
        """
        sample = self.streaming_sample
        limits: list[tuple[str, bool, str]] = [
            ("batch_size", self.batch_size >= 1, f"at least 1 row, found {self.batch_size}"),
            (
                "validation_fraction", 0 <= self.validation_fraction < 1,
                f"a share from 0 to below 1, found {self.validation_fraction}",
            ),
            (
                "max_bad_rows", 0 <= self.reading.max_bad_rows <= 1,
                f"a share from 0 to 1, found {self.reading.max_bad_rows}",
            ),
            ("shuffle_buffer", self.shuffle_buffer >= 1, f"at least 1 row, found {self.shuffle_buffer}"),
            (
                "group_by_prompt", not (self.group_by_prompt and (self.balanced_sampling or self.streaming)),
                "false with balanced_sampling or streaming, which draw rows apart from each other, found true",
            ),
            (
                "batch_size", not (self.balanced_sampling and self.batch_size % 2),
                f"an even number with balanced_sampling, found {self.batch_size}",
            ),
            ("streaming_sample", sample is None or self.streaming, f"none without data.streaming, found {sample}"),
            ("streaming_sample", sample is None or sample >= 1, f"at least 1 row, found {sample}"),
            (
                "streaming_sample", sample is None or not self.balanced_sampling,
                f"none with balanced_sampling, which needs the class of every row, found {sample}",
            ),
            (
                "conflicts", self.reading.conflicts == "keep" or not self.streaming,
                f"keep with data.streaming, which does not compare rows, found {self.reading.conflicts}",
            ),
        ]  # fmt: skip
        for option, fits, expected in limits:
            if not fits:
                raise ConfigError(f"data.{option}", f"expected {expected}.")

    @property
    def train_dataset(self) -> Dataset | None:
        """Rows to train on; ``None`` before ``setup`` has read them, as with those below, and with a stream."""
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

    def set_column(self, dataset_name: str, column: str, values: Any) -> None:
        """Adds what is known of every row before the first step to its table, from where batches take it.

        Loaders that were made before do not see it.

        Args:
            dataset_name: ``train``, ``validation``, ``test`` or ``predict``; where no test files were given, the rows
                of ``test`` are those of ``validation``.
            column: Such as ``reference_log_prob`` or ``importance_weight``; one of that name is replaced.
            values: One for each row, in order, as an array or a tensor; ``None`` takes the column away.

        Raises:
            ValueError: If there is no such table, or it has another number of rows.
        """
        name = "validation" if dataset_name == "test" and "test" not in self._row_sets else dataset_name
        dataset = self._dataset(name)
        if dataset is None:
            raise ValueError(f"expected a table of rows, found none ({dataset_name})")
        if column in dataset.column_names:
            dataset = dataset.remove_columns([column])
        if values is not None:
            values = np.asarray(values)
            if values.shape != (len(dataset),):
                raise ValueError(f"expected {len(dataset)} values for {column}, found {values.shape}")
            # Without a name of its own the table would be hashed whole, to make one.
            dataset = dataset.add_column(column, values, new_fingerprint=secrets.token_hex(8))
        self._row_sets[name].dataset = dataset
        if isinstance(self._training, TableRows) and name == "train":
            self._training.dataset = dataset

    @property
    def counts(self) -> list[RowCounts]:
        """What became of the rows of each data set, in the order in which they were read."""
        streamed = [self._training.counts] if isinstance(self._training, StreamedRows) else []
        return [*streamed, *(row_set.counts for row_set in self._row_sets.values())]

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
        return RowTokenizer(self.tokenizer, self.limits, self.chat_template)

    def source_names(self, name: str) -> list[str]:
        """Names of the sources of what is logged as ``train``, ``val`` or ``test``, by the numbers that rows carry."""
        held_out = self.validation_files or self.train_files
        sources = {"train": self.train_files, "val": held_out, "test": self.test_files or held_out}[name]
        return [source.label for source in sources]

    @property
    def class_frequencies(self) -> tuple[float, float]:
        """Shares of thumbs-up and thumbs-down among the rows that a step draws."""
        if self.balanced_sampling:
            return 0.5, 0.5
        num_up, num_down = self._trained_on.class_counts
        return num_up / (num_up + num_down), num_down / (num_up + num_down)

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all processes and accumulated micro-batches."""
        trainer = self.trainer
        return self.batch_size * self._accumulation * (trainer.world_size if trainer else 1)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every training row as often as its source's weight says, and at least so often.

        With balanced sampling, the rarer class is seen more often.
        """
        return self._order.steps_per_epoch

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
                self._row_sets = {
                    name: RowSet.shared(row_set) for name, row_set in told["row_sets"].items() if name != _STREAM
                }
                if _STREAM in told["row_sets"]:
                    self._training = StreamedRows.shared(told["row_sets"][_STREAM], self.train_files, self.reading)
                elif "train" in self._row_sets:
                    self._training = self._table_rows()
            except FaultError as fault:
                faults.append(fault)
        for error in errors_of_all(faults, self.trainer):
            raise error

    def train_dataloader(self) -> DataLoader[FeedbackBatch]:
        """Micro-batches of this rank, from the trainer's current optimizer step on."""
        trainer = self.trainer
        if trainer is not None:
            _refuse_shortened_epochs(trainer)
        training = self._trained_on
        sampler = StepBatchSampler(
            self._order,
            batch_size=self.batch_size,
            accumulation=self._accumulation,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
            current_step=lambda: trainer.global_step if trainer else 0,
            lengths=self._lengths_to_sort_by(training),
        )
        if isinstance(training, TableRows):
            return self._loader(training.dataset, batch_sampler=sampler)
        rows_of_rank = self.batch_size * self._accumulation
        self._stream = training.dataset(
            self.tokenizer,
            self.rows_per_step,
            rows_of_rank,
            self.balanced_sampling,
            self.shuffle_buffer,
            self.with_words,
        )
        return self._loader(self._stream, batch_sampler=sampler)

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

    def training_rows(self, most: int) -> Dataset:
        """The training rows as a table; of a stream about ``most`` of them, drawn evenly from all over."""
        training = self._trained_on
        if isinstance(training, TableRows):
            return training.dataset
        with RowTable(self.source_names("train")) as table:
            for found in training.sample(self.tokenizer, most):
                table.append(found.row, found.sample, found.source)
            row_set = table.divide({"sample": np.ones(len(table), dtype=bool)})["sample"]
        if row_set.dataset is None:
            raise FeedbackRowError("train", f"expected usable rows in a sample of {most}, found none.")
        return row_set.dataset

    def passes_of(self, dataset: Dataset) -> np.ndarray[Any, Any] | None:
        """How often an epoch draws each row of a table of training rows, about; ``None`` if all alike."""
        weights = np.array([source.weight for source in self.train_files], dtype=np.float64)
        return weights[np.asarray(dataset.data.column("source"))] if (weights != weights[0]).any() else None

    def place_of(self, row_id: int) -> str:
        """File and line of a training row."""
        return (self._stream or self._trained_on).place_of(row_id)  # type: ignore[union-attr]

    def teardown(self, stage: str) -> None:
        """Says which rows of a stream turned out to be unusable when their turn came, and were replaced by others."""
        if self._stream is None or stage != "fit":
            return
        for reason, counted in self._stream.replaced().items():
            _log.warning(
                "process %d: %d rows of the stream were replaced by others: %s (%s)",
                self.trainer.global_rank if self.trainer else 0, counted.count, reason, counted,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """How a step is cut into micro-batches; the position itself is the trainer's step."""
        return {} if self._training is None else {"accumulation": self._accumulation}

    def fingerprints(self) -> dict[str, Any]:
        """What the rows and their order depend on; the module compares it before a run goes on."""
        if self._training is None:
            return {}
        streaming = {"streaming_sample": self.streaming_sample, "shuffle_buffer": self.shuffle_buffer}
        return {
            "rows": self._training.num_rows,
            "row_digest": self._training.digest,
            **(streaming if self.streaming else {}),
            "seed": self.seed,
            "rows_per_step": self.rows_per_step,
            "balanced_sampling": self.balanced_sampling,
            **asdict(self.limits),
            "chat_template": chosen_template(self.tokenizer, self.chat_template),
            "conflicts": self.reading.conflicts,
            "source_weights": [source.weight for source in self.train_files],
            **({"group_by_prompt": True} if self.group_by_prompt else {}),
        }

    def _told(self, stage: str | None) -> dict[str, Any]:
        """Reads, and says in plain values what the other processes of this node have to know."""
        self._read(stage)
        row_sets = {name: row_set.told() for name, row_set in self._row_sets.items()}
        if isinstance(self._training, StreamedRows):
            row_sets[_STREAM] = self._training.told()
        return {"row_sets": row_sets, "feedback": self.feedback_summary and asdict(self.feedback_summary)}

    def _read(self, stage: str | None) -> None:
        if stage in ("fit", None) and self._training is None:
            self._setup_training()
        if stage == "test" and self.test_files:
            if self.test_dataset is None:
                self._keep(self._reader.read_all("test", self.test_files))
        elif stage in ("validate", "test") and self.validation_dataset is None:
            self._setup_validation()
        if stage == "predict" and self.predict_dataset is None:
            if not self.predict_files:
                raise ConfigError("data.predict_files", "expected files to score, found none.")
            self._keep(self._reader.read_all("predict", self.predict_files, labelled=False))

    @property
    def _reader(self) -> RowReader:
        return RowReader(self.reading, self.tokenizer, self._cache)

    @property
    def _accumulation(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer is not None else 1

    @property
    def _is_padded(self) -> bool:
        return self.trainer is not None and getattr(self.trainer.lightning_module, "layout", "packed") == "padded"

    @property
    def train_lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of each training row, where they are not streamed."""
        training = self._trained_on
        if isinstance(training, StreamedRows):
            raise ConfigError("data.streaming", "expected false where lengths of all rows are needed, found true.")
        return training.lengths

    def _lengths_to_sort_by(self, training: TableRows | StreamedRows) -> np.ndarray[Any, Any] | None:
        """Lengths, where micro-batches are padded; sorted rows would leave some of them with one class alone."""
        sorts = self._is_padded and not self.balanced_sampling
        return training.lengths if sorts and isinstance(training, TableRows) else None

    @property
    def _order(self) -> StepOrder:
        """Which rows each step trains on; the number of rows of a step is known when there is a trainer."""
        if self._known_order is None or self._known_order[0] != self.rows_per_step:
            training, rows, balanced = self._trained_on, self.rows_per_step, self.balanced_sampling
            if isinstance(training, TableRows):
                order: StepOrder = training.order(rows, balanced, self.group_by_prompt)
            else:
                order = training.order(rows, balanced, self.shuffle_buffer)
            self._known_order = (rows, order)
        return self._known_order[1]

    def _dataset(self, name: str) -> Dataset | None:
        return self._row_sets[name].dataset if name in self._row_sets else None

    @property
    def _trained_on(self) -> TableRows | StreamedRows:
        if self._training is None:
            raise _no_training_files()
        return self._training

    def _table_rows(self) -> TableRows:
        row_set = self._row_sets["train"]
        return TableRows(row_set.dataset, row_set.counts, row_set.digest, self.train_files, self.seed)

    def _setup_validation(self) -> None:
        if self.validation_files:
            self._keep(self._reader.read_all("validation", self.validation_files))
        elif self.train_files and not self.streaming:
            self._setup_training()
        if self.validation_dataset is None:
            raise ConfigError("data.validation_files", "expected files to evaluate on, found none.")

    def _setup_training(self) -> None:
        if not self.train_files:
            raise _no_training_files()
        if self.streaming:
            self._setup_stream()
            return
        rows = self._reader.read_training(self.train_files, self.validation_files, self.validation_fraction)
        self.feedback_summary = rows.summary
        rank_zero_info(str(rows.summary))
        self._keep(rows)
        self._training = self._table_rows()
        self._check_classes()

    def _setup_stream(self) -> None:
        self._training = StreamedRows.read(
            "train", self.train_files, self.reading, self.tokenizer, self.streaming_sample
        )
        rank_zero_info(str(self._training))
        self._check_classes()
        if self.validation_files:
            self._keep(self._reader.read_all("validation", self.validation_files))
        elif self.validation_fraction:
            rank_zero_info("validation: nothing is held out of a stream; give data.validation_files to measure it")

    def _check_classes(self) -> None:
        num_up, num_down = self._trained_on.class_counts
        _require_both_classes(num_up, num_down, self.train_files)
        if self.balanced_sampling:
            rank_zero_info(_balance_in_words(num_up, num_down))

    def _keep(self, rows: ReadRows) -> None:
        for name, row_set in rows.row_sets.items():
            self._row_sets[name] = row_set
            rank_zero_info(str(row_set.counts))
            row_set.counts.require_used()

    def _evaluation_loader(self, dataset: Dataset | None) -> DataLoader[FeedbackBatch] | list[Any]:
        if dataset is None:
            return []
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return self._loader(dataset, batch_sampler=EvenBatchSampler(len(dataset), self.batch_size, rank, world_size))

    def _loader(self, dataset: Dataset | StreamDataset, **arguments: Any) -> DataLoader[FeedbackBatch]:
        if isinstance(dataset, Dataset):
            dataset = dataset.select_columns([name for name in _OF_BATCHES if name in dataset.column_names])
        return DataLoader(
            dataset,  # type: ignore[arg-type]
            collate_fn=partial(collate, share_prompts=self.group_by_prompt),
            num_workers=self.num_workers,
            # Without its own, a loader draws from the global generator whenever it is iterated.
            generator=torch.Generator().manual_seed(self.seed),
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            **arguments,
        )


def _no_training_files() -> ConfigError:
    return ConfigError("data.train_files", "expected files to train on, found none.", "Set data.train_files.")


def _sources(files: list[str | Source] | str | None, option: str) -> list[Source]:
    given = [files] if isinstance(files, (str, Source)) else list(files or [])
    sources = [file if isinstance(file, Source) else Source(file) for file in given]
    twice = [name for name, count in Counter(source.label for source in sources).items() if count > 1]
    if twice:
        raise ConfigError(
            f"data.{option}", f"expected a name for each source, found {twice[0]!r} twice.", "Give them names."
        )
    if option != "train_files" and any(source.weight != 1 for source in sources):
        raise ConfigError(f"data.{option}", "expected no weights, which are for sources to train on, found some.")
    return sources


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


def _require_both_classes(num_up: float, num_down: float, sources: list[Source]) -> None:
    if not (num_up and num_down):
        raise FeedbackRowError(
            ", ".join(public_name(source.path) for source in sources),
            f"expected thumbs of both kinds to train on, found {num_up + num_down:.0f} rows that are all "
            f"{'thumbs-up' if num_up else 'thumbs-down'}.",
            "A classifier needs both classes; for good examples alone use supervised fine-tuning.",
        )
    share = min(num_up, num_down) / (num_up + num_down)
    if share < 0.2:
        rank_zero_info(
            f"Only {share:.0%} of the training rows are of the rarer class. model.class_weights: auto keeps the loss "
            "balanced; data.balanced_sampling: true also makes every step see both classes."
        )


def _balance_in_words(num_up: float, num_down: float) -> str:
    rarer, fewer, more = ("thumbs-up", num_up, num_down) if num_up < num_down else ("thumbs-down", num_down, num_up)
    if fewer == more:
        return "balanced sampling: both classes are as frequent; an epoch draws each row once"
    return (
        f"balanced sampling: an epoch draws {more:.0f} rows of each class; the {fewer:.0f} of {rarer} are drawn "
        f"{more / fewer:.2f} times each, none more than once oftener than another"
    )


def _refuse_injected_sampler(trainer: Any) -> None:
    if trainer._accelerator_connector.use_distributed_sampler:
        raise ConfigError(
            "trainer.use_distributed_sampler",
            "expected false with more than one process, found true.",
            "The data module gives each process its own rows; Lightning's sampler would repeat some.",
        )
