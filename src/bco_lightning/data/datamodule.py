"""The data module: feedback logs in, seeded batches of unpaired rated completions out."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from bco_lightning.batch import FeedbackBatch
from bco_lightning.data.chat import asks_for_date, chosen_template, today
from bco_lightning.data.collate import COLUMNS, collate_cut, select_known
from bco_lightning.data.counts import FeedbackSummary, RowCounts
from bco_lightning.data.demands import pairs_of, refuse_options, require
from bco_lightning.data.given import with_given
from bco_lightning.data.images import ImageInputs
from bco_lightning.data.once_per_node import read_once_per_node
from bco_lightning.data.options import DataOptions, Source
from bco_lightning.data.order import EvenBatchSampler, StepBatchSampler
from bco_lightning.data.row_sets import ReadRows, RowReader, RowSet, row_format_of
from bco_lightning.data.stream import StreamDataset
from bco_lightning.data.tokenize import RowTokenizer
from bco_lightning.data.training import TrainingRows, telling_rows
from bco_lightning.errors import ConfigError
from bco_lightning.identity import digest_of_values
from bco_lightning.parallel.collectives import Processes
from bco_lightning.parallel.sharding import sharding_of
from bco_lightning.places import cache_root

_log = logging.getLogger("lightning.pytorch")
_NO_TRAINING_FILES = "data.train_files", "expected files to train on, found none.", "Set data.train_files."
_DRAWN = 64  # rows of a stream that are looked at for telling ones


class FeedbackDataModule(LightningDataModule):
    """Streams thumbs-up / thumbs-down rows as packed micro-batches.

    Training rows come in a new seeded order on every pass. An epoch is ``ceil(rows / rows per step)`` optimizer steps;
    where rows do not divide, its last step takes its missing rows from the next pass, so nothing is left out.

    Args:
        positional: ``train_files`` and ``validation_files``.
        tokenizer: A tokenizer, for use without a :class:`BCOModule`; else the module's own is taken.
        train: Rows that Python holds, beside those of files: a list or another iterable of dictionaries, a ``Dataset``
            or ``IterableDataset`` of ``datasets``, a frame of pandas. They are written into a temporary file and read
            like one; their places are ``row 17 of train``.
        validation: Held-out rows, in the same way.
        test: Those of ``test``.
        predict: Those of ``predict``.
        options: Those of :class:`~bco_lightning.data.options.DataOptions`, by keyword.

    Raises:
        FeedbackRowError: If such rows cannot be written as JSON.
        ConfigError: If an option is out of range, or two do not go together.
    """

    def __init__(
        self, *positional: Any, tokenizer: Any = None, train: Any = None, validation: Any = None, test: Any = None,
        predict: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        given = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.options = with_given(DataOptions(*positional, **options), given, self)
        for source in (*self.options.sources("train"), Source("any")):  # what is wrong is said before anything is read
            row_format_of(self.options, source)
        self._tokenizer, self._day_is_given = tokenizer, True
        self._rows: dict[str, ReadRows] = {}  # by what was asked for, in the order in which it was read
        self._found: list[ReadRows] = []  # also where no row of it can be used
        self._training: TrainingRows | None = None
        self._read_with = ""  # digest
        self._asked_tokens = self.options.tokens_per_micro_batch
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a process may have no row to evaluate

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
        """Adds what is known of every row, in order, to its table, from where batches take it; ``None`` takes it away.

        Loaders that were made before do not see it. Where no test files were given, the rows of ``test`` are those of
        ``validation``.

        Raises:
            ValueError: If there is no such table, or it has another number of rows.
        """
        row_sets = self._row_sets
        name = "validation" if dataset_name == "test" and "test" not in row_sets else dataset_name
        dataset = self._dataset(name)
        if dataset is None:
            raise ValueError(f"expected a table of rows, found none ({dataset_name})")
        if column in dataset.column_names:
            dataset = dataset.remove_columns([column])
        if values is not None:
            values = np.asarray(values)
            if values.shape != (len(dataset),):
                raise ValueError(f"expected {len(dataset)} values for {column}, found {values.shape}")
            dataset = dataset.add_column(column, values, new_fingerprint=secrets.token_hex(8))  # or it is hashed whole
        row_sets[name].dataset = dataset

    def telling_rows(self, *names: str) -> list[dict[str, Any]]:
        """Rows that a trial should see, with what a model sees of their images."""
        tables = {name: self._dataset(name) for name in names or self._row_sets}
        if "train" in tables:
            tables["train"] = self.training.table(_DRAWN)
        found = [row for table in tables.values() for row in telling_rows(table)]
        return [{**row, "seen": ImageInputs(self.tokenizer)(row.get("images"))} for row in found]

    @property
    def counts(self) -> list[RowCounts]:
        """What became of the rows of each data set, in the order in which they were read."""
        return [row_set.counts for row_set in self._row_sets.values()]

    @property
    def bad_rows(self) -> list[dict[str, str]]:
        """Each malformed row that was left out: ``place``, ``reason``, ``expected``, ``found`` and ``remedy``."""
        return [row for read in self._found for row in read.bad_rows()]

    @property
    def feedback_summary(self) -> FeedbackSummary | None:
        """What the log to train on looks like, once it is read."""
        return self._rows["training"].summary if "training" in self._rows else None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer given, or the module's."""
        if self._tokenizer is not None:
            return self._tokenizer
        if self.trainer is None:
            raise ConfigError("FeedbackDataModule", "expected a tokenizer or a BCOModule's trainer, found neither.")
        return self.trainer.lightning_module.tokenizer

    @property
    def told(self) -> dict[str, str]:
        """The chat template that tells rows and, to one that asks, which day it is."""
        named, day = self.options.chat_template, self.options.template_date
        dated = {"template_date": day} if day and asks_for_date(self.tokenizer, named) else {}
        return {"chat_template": chosen_template(self.tokenizer, named), **dated}

    @property
    def row_tokenizer(self) -> RowTokenizer:
        """Tokenizes one row by this module's options."""
        return self._reader.row_tokenizer

    def source_names(self, name: str) -> list[str]:
        """Names of the sources of what is logged as ``train``, ``val`` or ``test``, by the numbers that rows carry."""
        options = self.options
        held_out = options.sources("validation") or options.sources("train")
        sources = {"train": options.sources("train"), "val": held_out, "test": options.sources("test") or held_out}
        return [source.label for source in sources[name]]

    @property
    def training(self) -> TrainingRows:
        """The rows to train on, whether they are a table or a stream."""
        if "training" not in self._rows:
            raise ConfigError(*_NO_TRAINING_FILES)
        if self._training is None:
            rows = self._rows["training"].row_sets["train"]
            self._training = TrainingRows(rows, self.options, self._reader, self._objective)
        return self._training

    @property
    def class_frequencies(self) -> tuple[float, float]:
        """Shares of thumbs-up and thumbs-down among the rows that a step draws."""
        up, down = self.training.class_counts
        return (0.5, 0.5) if self.options.balanced_sampling else (up / (up + down), down / (up + down))

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all processes and accumulated micro-batches."""
        return self.options.batch_size * self._accumulation * self._group.world_size

    @property
    def tokens_per_micro_batch(self) -> int | str | None:
        """The most tokens of a micro-batch; ``None`` where micro-batches are counted in rows."""
        if self.options.tokens_per_micro_batch == "auto" and (module := self._module) is not None:
            self.options = replace(self.options, tokens_per_micro_batch=module.tokens_that_fit())
        return self.options.tokens_per_micro_batch

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every training row as often as its source's weight says, and at least so often.

        With balanced sampling, the rarer class is seen more often.
        """
        return self.training.order(self.rows_per_step).steps_per_epoch

    def setup(self, stage: Literal["fit", "validate", "test", "predict"] | str | None = None) -> None:
        """Reads and tokenizes what ``stage`` needs, and prints what became of the rows.

        Of several processes the first one of each node reads; the others wait, however long it takes, and open its
        files. What one of them raises, all raise.

        Raises:
            FeedbackRowError: On a missing source, a malformed row, if there is only one class to train on, or if a node
                has other rows than the first node.
            ConfigError: If there are no files for this stage.
        """
        trainer: Any = self.trainer
        self._date_templates(stage)
        if stage == "fit":  # another model may have other room
            self.options = replace(self.options, tokens_per_micro_batch=self._asked_tokens)
        self._training = None  # another module may draw the same rows by another objective, or have another tokenizer
        if (read_with := digest_of_values(self._reader.depends_on)) != self._read_with:
            self._rows, self._found, self._read_with = {}, [], read_with
        if self._group.world_size == 1:
            return self._read(stage)
        if trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigError(
                "trainer.use_distributed_sampler",
                "expected false with more than one process, found true.",
                "The data module gives each process its own rows; Lightning's sampler would repeat some.",
            )
        return read_once_per_node(lambda: self._read(stage), self._rows, trainer)

    def takes_day_of(self, fingerprints: Mapping[str, Any]) -> str:
        """Reads the rows of a stage anew for the day of the run that goes on, if they were read for today.

        Gives the stage, whose rows are others then; else an empty text.
        """
        day, trainer = fingerprints.get("template_date"), cast(Any, self.trainer)
        if self._day_is_given or day in (None, self.options.template_date):
            return ""
        self.options, self._rows, self._training = replace(self.options, template_date=day), {}, None
        rank_zero_info(f"chat template: it is told {day}, when the run began; all rows are read again")
        self.setup(trainer.state.fn)
        return str(trainer.state.fn.value)

    def train_dataloader(self) -> DataLoader[FeedbackBatch]:
        """Micro-batches of this rank, from the trainer's current optimizer step on."""
        trainer: Any = self.trainer
        whole = trainer is None or trainer.fast_dev_run
        if not whole and (trainer.limit_train_batches not in (None, 1.0) or trainer.overfit_batches):
            raise ConfigError(
                "trainer.overfit_batches" if trainer.overfit_batches else "trainer.limit_train_batches",
                "expected whole epochs, since the row order is derived from the optimizer step; found a limit.",
                "Use trainer.max_steps to train for less than an epoch.",
            )
        training, here, tokens = self.training, self._group, self.tokens_per_micro_batch
        # Sorted rows of balanced steps would leave some micro-batches with one class alone, and scatter a prompt's.
        mixes = self.options.balanced_sampling or training.paired or training.by_prompt
        sorts = getattr(self._module, "layout", "") == "padded" and not mixes
        sampler = StepBatchSampler(
            training.order(self.rows_per_step), batch_size=self.options.batch_size, accumulation=self._accumulation,
            rank=here.global_rank, world_size=here.world_size, dealt=bool(tokens), with_next=training.with_unrelated,
            current_step=lambda: trainer.global_step if trainer else 0, lengths=training.lengths if sorts else None,
        )  # fmt: skip
        return self._loader(training.dataset(), sampler, paired=training.paired, with_unrelated=training.with_unrelated)

    def val_dataloader(self) -> DataLoader[FeedbackBatch] | list[Any]:
        """The held-out rows of this rank, each once, in file order; empty if nothing is held out."""
        return self._evaluation_loader(self.validation_dataset)

    def test_dataloader(self) -> DataLoader[FeedbackBatch] | list[Any]:
        """The test rows, or the held-out rows where no test files were given."""
        return self._evaluation_loader(self.test_dataset or self.validation_dataset)

    def predict_dataloader(self) -> DataLoader[FeedbackBatch] | list[Any]:
        """The rows to score."""
        sharded = self.trainer is not None and sharding_of(self.trainer) is not None
        return self._evaluation_loader(self.predict_dataset, "data.predict_files" if sharded else "", paired=False)

    def datasets_of(self, stage: str) -> dict[str, Dataset]:
        """What a stage (``fit``, ``validate``, ``test`` or ``predict``) runs on, by Lightning's name of each run."""
        trainer, held_out = cast(Any, self.trainer), self.validation_dataset
        found = {
            "fit": {"train": self.train_dataset, "validate": held_out if trainer.enable_validation else None},
            "validate": {"validate": held_out},
            "test": {"test": self.test_dataset or held_out},
            "predict": {"predict": self.predict_dataset},
        }[stage]
        return {name: dataset for name, dataset in found.items() if dataset is not None}

    def teardown(self, stage: str) -> None:
        """Says how many rows of a stream turned out to be unusable when their turn came, and were replaced."""
        rows = self._training and self._training.dataset()
        if stage == "fit" and isinstance(rows, StreamDataset) and (count := rows.num_replaced):
            _log.warning("process %d: %d rows of the stream were replaced by others", self._group.global_rank, count)

    def state_dict(self) -> dict[str, Any]:
        """How a step is cut into micro-batches; the position itself is the trainer's step."""
        tokens = self.options.tokens_per_micro_batch
        return {"accumulation": self._accumulation, "tokens": tokens} if "training" in self._rows else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over how many tokens ``auto`` was, whatever the device is now: so a run goes on to the bit."""
        if self.options.tokens_per_micro_batch == "auto" and (then := state_dict.get("tokens")):
            self.options = replace(self.options, tokens_per_micro_batch=then)

    def fingerprints(self) -> dict[str, Any]:
        """What the rows and their order depend on; the module compares it before a run goes on."""
        if "training" not in self._rows:
            return {}
        training, options = self.training, self.options
        columns = getattr(training.row_set.dataset, "column_names", ())
        names = set(DataOptions.names("refused")) - ({"shuffle_buffer"} if not options.streaming else set())
        return {
            "rows": training.row_set.counts.used,
            "row_digest": training.row_set.digest,
            "rows_per_step": self.rows_per_step,
            **self.told,
            "source_weights": training.weights,
            **({"processor": ImageInputs(self.tokenizer).digest()} if "images" in columns else {}),
            **{name: getattr(options, name) for name in sorted(names)},
        }

    def _date_templates(self, stage: str | None) -> None:
        """Settles for all processes which day it is to templates that ask: today, unless it is given."""
        if self.options.template_date is None and asks_for_date(self.tokenizer, self.options.chat_template):
            known = "" if stage == "fit" else getattr(self._module, "told", {}).get("template_date")
            day = known or (self.trainer.strategy.broadcast(today()) if self.trainer is not None else today())
            self.options, self._day_is_given = replace(self.options, template_date=day), False
            rank_zero_info(f"chat template: it asks for the date, and is told {day} (data.template_date)")

    def _read(self, stage: str | None) -> None:
        options, objective = self.options, self._objective
        refuse_options(objective, options)
        if stage in ("fit", None):
            self._read_training()
        elif stage == "predict" or (stage == "test" and options.sources("test")):
            self._read_files("predict" if stage == "predict" else "test")  # Lightning's own is no plain text
        elif self.validation_dataset is None:
            if options.sources("validation"):
                self._read_files("validation")
            elif options.sources("train") and not options.streaming:
                self._read_training()
            if self.validation_dataset is None:
                raise ConfigError("data.validation_files", "expected files to evaluate on, found none.")
        # Also of rows that were read before, for another module.
        for name, rows in self.datasets_of(stage or "fit").items() if objective and stage != "predict" else ():
            require(objective, rows, name)
        if stage in ("fit", None) and (options.balanced_sampling or not getattr(objective, "takes_one_class", False)):
            self.training.check_classes()
        if (held_out := self._row_sets.get("validation")) and stage in ("fit", None, "validate"):
            held_out.counts.warn_of_one_class()

    def _read_training(self) -> None:
        options = self.options
        if not options.sources("train"):
            raise ConfigError(*_NO_TRAINING_FILES)
        if "training" not in self._rows:
            self._keep("training", self._reader.read_training(self._cache))
        if options.streaming and not options.sources("validation") and options.validation_fraction:
            rank_zero_info("validation: nothing is held out of a stream; give data.validation_files to measure it")

    def _read_files(self, name: str) -> None:
        if not (sources := self.options.sources(name)):
            raise ConfigError(f"data.{name}_files", "expected files to score, found none.")
        if name not in self._rows:
            self._keep(name, self._reader.read(name, sources, self._cache, labelled=name != "predict"))

    def _keep(self, name: str, found: ReadRows) -> None:
        self._found.append(found)
        counts = [row_set.counts for row_set in found.row_sets.values()]
        for told in filter(None, (found.summary, *counts)):
            rank_zero_info(str(told))
        for each in counts:
            each.require_used()
        self._rows[name] = found

    @property
    def _reader(self) -> RowReader:
        return RowReader(self.options, self.tokenizer)

    @property
    def _cache(self) -> Path | None:
        return cache_root(self.options.cache_folder) / "tokenized_rows" if self.options.cache_rows else None

    @property
    def _row_sets(self) -> dict[str, RowSet]:
        return {name: row_set for read in self._rows.values() for name, row_set in read.row_sets.items()}

    def _dataset(self, name: str) -> Dataset | None:
        row_set = self._row_sets.get(name)
        return row_set.dataset if row_set is not None and row_set.files is None else None

    @property
    def _accumulation(self) -> int:
        return int(getattr(self.trainer, "accumulate_grad_batches", 1))

    @property
    def _group(self) -> Processes:
        return cast(Processes, self.trainer or Processes())

    @property
    def _module(self) -> Any:
        return getattr(self.trainer, "lightning_module", None)

    @property
    def _objective(self) -> Any:
        return getattr(self._module, "objective", None)

    def _evaluation_loader(
        self, dataset: Dataset | None, needed_by_all: str = "data.validation_files", *, paired: bool | None = None
    ) -> DataLoader[FeedbackBatch] | list[Any]:
        if dataset is None:
            return []
        paired = getattr(self._objective, "takes_pairs", False) if paired is None else paired
        pairs = pairs_of(dataset) if paired else None
        number, size = len(dataset if pairs is None else pairs), max(1, self.options.batch_size // (2 if paired else 1))
        if needed_by_all and number < self._group.world_size:
            # Lightning passes over an evaluation in the processes that have no row of it, and the others wait for them.
            raise ConfigError(
                needed_by_all,
                f"expected a row for each of {self._group.world_size} processes, found {number}.",
                "Give more rows, use fewer processes, or hold out none (data.validation_fraction: 0).",
            )
        sampler = EvenBatchSampler(number, size, self._group.global_rank, self._group.world_size, pairs)
        return self._loader(dataset, sampler, paired=paired)

    def _loader(self, dataset: Any, sampler: Any, **collated: Any) -> DataLoader[FeedbackBatch]:
        if isinstance(dataset, Dataset):
            dataset = select_known(dataset, COLUMNS)
        collated |= {"share_prompts": self.options.group_by_prompt, "most_tokens": self.tokens_per_micro_batch}
        collated |= {"padded": getattr(self._module, "layout", "") == "padded", "images": ImageInputs(self.tokenizer)}
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=partial(collate_cut, whole_prompts=getattr(self._objective, "takes_prompts", False), **collated),
            num_workers=self.options.num_workers,
            generator=torch.Generator().manual_seed(self.options.row_seed),  # or it would draw from the global one
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )
