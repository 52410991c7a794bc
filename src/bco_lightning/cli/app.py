"""The command line: ``fit`` and what else LightningCLI runs, and ``inspect``, ``export`` and ``plan``."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import difflib
import json
import logging
import os
import platform
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers.utils.logging import disable_progress_bar
from typing_extensions import override

from bco_lightning.callbacks import (
    FiniteGuard,
    PredictionWriter,
    RunCheckpoint,
    SpeedMonitor,
    StepProgressBar,
)
from bco_lightning.checkpoints import VerifiedCheckpointIO, resolve_checkpoint
from bco_lightning.cli import safety
from bco_lightning.cli.faults import in_words, watch_processes
from bco_lightning.cli.help import keeping_help
from bco_lightning.data import FeedbackDataModule
from bco_lightning.data.options import Columns, Rating, Source
from bco_lightning.demo.trial import KnownRewardTrial
from bco_lightning.errors import CheckpointError, ConfigError, PreemptedError, UserError
from bco_lightning.export import export_checkpoint
from bco_lightning.identity import git_revision, versions
from bco_lightning.inspection.inspect_command import inspect_command, split_arguments
from bco_lightning.module import BCOModule
from bco_lightning.options import LoraSettings, PromptFeatures
from bco_lightning.parallel.collectives import is_in_a_group
from bco_lightning.parallel.strategy import named_strategy
from bco_lightning.planning.plan_command import plan_command

_DESCRIPTION = """Align language models from thumbs-up / thumbs-down feedback. Besides the commands below there are
`inspect`, which reports on the data of a config before it is trained on, `export`, which writes a checkpoint as a
folder that transformers and peft load, and `plan`, which works out what a run would take of each GPU's memory: see
`inspect --help`, `export --help` and `plan --help`. Any command takes --debug, which shows the traceback of an
error."""
DEBUG = "--debug"
_CLI = TypeVar("_CLI", bound="BCOCLI")


class BCOArgumentParser(LightningArgumentParser):
    """Suggests the option that was probably meant, and takes no objects where only Python can give them."""

    @override
    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:
        if theclass is FeedbackDataModule:
            kwargs["skip"] = {*(kwargs.get("skip") or ()), "tokenizer"}
            kwargs["sub_configs"] = False  # a log's lines would be taken for a list of logs
        return super().add_class_arguments(theclass, *args, **kwargs)  # type: ignore[no-any-return]

    @override
    def instantiate(self, namespace: Namespace, instantiate_groups: bool = True, **options: Any) -> Namespace:
        kinds = (Source, Rating, Columns, PromptFeatures, LoraSettings)
        options["instantiators"] = [(_made, kind, False) for kind in kinds]
        return super().instantiate(namespace, instantiate_groups, **options)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[misc]
        safety.refuse_import_named_in(message)
        unknown = re.search(r"(?:accept option|nested key|[Uu]nrecognized arguments:|Key) '?(?:--)?([\w.]+)", message)
        if unknown and "xpected a" not in message:
            close = difflib.get_close_matches(unknown[1], _options_of(self), n=1, cutoff=0.7)
            message += f"\nDid you mean --{close[0]}?" if close else ""
        super().error(message, ex)


def _made(kind: type, **values: Any) -> Any:
    """Makes what is part of an option; jsonargparse would hide an error, and try what else the option could hold."""
    try:
        return kind(**values)
    except ConfigError as error:
        raise safety.Refusal(error.where, error.problem, error.remedy) from None


def _refuse_misread_sources(options: Namespace) -> None:
    """Refuses a list of sources with a mistake in it, which jsonargparse takes for the name of a file.

    Raises:
        ConfigError: Naming the mistake.
    """
    for name in ("train_files", "validation_files", "test_files", "predict_files"):
        given = options.get(name)
        for text in given if isinstance(given, list) else [given]:
            misread = _yaml_in(text)
            if misread is not None:
                known = ", ".join(field.name for field in fields(Source))
                raise ConfigError(
                    f"data.{name}",
                    f"expected a list of files and of mappings with {known}; found {_mistake_in(misread)}.",
                )


def _yaml_in(text: Any) -> Any:
    """The list or mapping that a text is in YAML; a file may be called like one, but hardly with these beginnings."""
    if not isinstance(text, str) or not text.lstrip().startswith(("[", "{", "- ")):
        return None
    with contextlib.suppress(yaml.YAMLError):
        value = safety.load_yaml(text)
        return value if isinstance(value, (list, dict)) else None
    return None


def _mistake_in(given: Any) -> str:
    """What keeps a value from being a list of sources."""
    if isinstance(given, dict):
        return "a mapping in no list"
    parser = BCOArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Source)
    for number, source in enumerate(given, 1):
        for part in [{key: source[key]} for key in source] if isinstance(source, dict) else [source]:
            try:
                if not isinstance(part, str):
                    parser.parse_object({"path": "-", **part})
            except (ArgumentError, TypeError):
                return f"{part} in number {number}"
    return "all of it as one text"


def _options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Names of a parser's options and of those of its subcommands, without dashes."""
    options: set[str] = set()
    for action in parser._actions:
        options |= {option.lstrip("-") for option in action.option_strings}
        if isinstance(action, argparse._SubParsersAction):
            options = options.union(*(_options_of(child) for child in action.choices.values()))
    return options


class RunConfig(SaveConfigCallback):
    """Writes the resolved config once data and model are there, so that a failed start leaves no folder."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Waits for :meth:`on_fit_start`."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes ``config.yaml``, and ``provenance.json``: seed, versions, git revision and digests of the inputs."""
        self.config.ckpt_path = None  # or this config would go on from a checkpoint that may be gone
        super().setup(trainer, pl_module, "fit")
        log_dir = trainer.log_dir  # a broadcast: every process has to ask
        if trainer.is_global_zero and log_dir is not None:
            provenance = {
                "seed": pl_module.hparams["seed"],
                "python": platform.python_version(),
                "versions": versions(),
                "git_revision": git_revision(),
                "fingerprints": pl_module.fingerprints(),  # type: ignore[operator]
            }
            text = json.dumps(provenance, indent=1, sort_keys=True, ensure_ascii=False)
            (Path(log_dir) / "provenance.json").write_text(text + "\n", encoding="utf-8")


class BCOCLI(LightningCLI):
    """LightningCLI with this package's module, data and callbacks, and one folder of runs."""

    _step_was_chosen = False  # not named by the user

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_folder", type=str, default="runs/bco", help="Each run gets a folder version_N in this one."
        )
        parser.add_argument(
            "--process_timeout",
            type=float,
            default=600.0,
            help="Seconds to wait for another process before the run ends with an error; the others also wait while "
            "the first one writes a checkpoint and reads it back.",
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(FiniteGuard, "guard")
        parser.add_lightning_class_args(KnownRewardTrial, "known_reward")
        parser.add_lightning_class_args(PredictionWriter, "predictions")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with safety.safe_parsing():
            super().parse_arguments(parser, args)
            _refuse_misread_sources(self.config[self.config.subcommand].data)
        safety.check_resolved(self.config[self.config.subcommand], args)

    @override
    def _parse_ckpt_path(self) -> None:
        """Keeps what the user asked for: Lightning would put the checkpoint's hyperparameters over it."""

    @override
    def before_instantiate_classes(self) -> None:
        options = self.config[self.subcommand]
        if options.ckpt_path is not None:
            options.ckpt_path = self._chosen_checkpoint(options.ckpt_path, Path(options.run_folder))

    def _chosen_checkpoint(self, asked: str, run_folder: Path) -> str | None:
        """The folder that ``last``, ``auto`` or a path means."""
        if asked not in ("last", "auto") and not Path(asked).exists():
            raise CheckpointError(asked, "expected a checkpoint, or the word 'last' or 'auto', found no such file.")
        try:
            place = run_folder if asked in ("last", "auto") else Path(asked)
            # By sizes alone: bytes are compared when they are read, once, by processes together.
            found = resolve_checkpoint(place, lambda error: rank_zero_info(f"checkpoint: skipped {error}"), share=None)
            self._step_was_chosen = found != place
        except CheckpointError as error:
            if asked != "auto":
                raise
            rank_zero_info(f"checkpoint: {error} Starting a new run, as 'auto' says.")
            return None
        rank_zero_info(f"checkpoint: {found}")
        return str(found)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self.config_init[self.subcommand]
        logger = TensorBoardLogger(options.run_folder, name="", version=self._version_of_checkpoint(options))
        if options.trainer.logger is None or options.trainer.logger is True:
            kwargs["logger"] = logger if self.subcommand != "predict" else False
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint):
                callback.run_folder = logger.log_dir  # wherever another logger writes
        trainer.strategy.checkpoint_io = VerifiedCheckpointIO(may_fall_back=self._step_was_chosen)
        if hasattr(trainer.strategy, "_timeout"):  # half an hour, if left alone
            trainer.strategy._timeout = timedelta(seconds=options.process_timeout)
        return trainer

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Lightning's own default would unpickle whatever a checkpoint holds.
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except UserError:
            self._discard_unstarted_run()
            raise

    def _discard_unstarted_run(self) -> None:
        """Removes the run folder that Lightning makes before it looks at data and model, if nothing else is in it."""
        logger = self.trainer.logger  # trainer.log_dir would wait for processes that have not failed
        if not self.trainer.is_global_zero or not isinstance(logger, TensorBoardLogger):
            return
        run = Path(logger.log_dir)
        contents = list(run.iterdir()) if run.is_dir() else []
        if contents and all(path.name.startswith("events.out.tfevents") for path in contents):
            for path in contents:
                path.unlink()
            with contextlib.suppress(OSError):  # other runs are in there
                os.removedirs(run)

    def _version_of_checkpoint(self, options: Any) -> str | None:
        """A run goes on, and is evaluated, in its own folder."""
        if options.ckpt_path is None:
            return None
        run = Path(options.ckpt_path).parent.parent
        return run.name if run.parent.resolve() == Path(options.run_folder).resolve() else None

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, RunCheckpoint)]
        if config.get("enable_progress_bar") is not False:
            callbacks = [StepProgressBar(), *callbacks]
        if isinstance(config.get("strategy"), str):
            config["strategy"] = named_strategy(config["strategy"])
        return super()._instantiate_trainer(config, [*callbacks, SpeedMonitor()])

    def after_fit(self) -> None:
        """Says where everything is and what to type next."""
        log_dir = self.trainer.log_dir  # a broadcast: every process has to ask
        if not self.trainer.is_global_zero or log_dir is None:
            return
        run = Path(log_dir)
        saved = [
            callback.saved for callback in self.trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoint)
        ]
        checkpoint = saved[0] if saved else None
        alignment = run / "alignment.json"
        module = self.model
        print(f"\nRun folder   {run}")
        if checkpoint is not None:
            print(
                f"Checkpoint   {checkpoint} ({self.trainer.global_step} optimizer steps, "
                f"reward shift {module.reward_shift.value:.4f})"
            )
        if alignment.exists():
            print(f"Alignment    {alignment}")
        print(
            f"\nNext:\n"
            f"  tensorboard --logdir {self.config[self.subcommand].run_folder}\n"
            f"  python -m bco_lightning export --ckpt_path {run} --output_dir exports/{run.name} --merge\n"
            f"  python -m bco_lightning predict --config {run / 'config.yaml'} --run_folder {run.parent} "
            f"--ckpt_path {run} --data.predict_files FILE"
        )


class DataCLI(BCOCLI):
    """Parses and checks what ``fit`` would run with, and makes neither model nor trainer."""

    @override
    def before_instantiate_classes(self) -> None:
        """No checkpoint is looked for."""

    @override
    def instantiate_classes(self) -> None:
        """Makes the arguments of data module and module alone."""
        parser = BCOArgumentParser()
        parser.add_class_arguments(FeedbackDataModule, "data", fail_untyped=False, instantiate=False)
        parser.add_class_arguments(BCOModule, "model", fail_untyped=False, instantiate=False)
        options = parser.instantiate(Namespace(data=self.config.fit.data, model=self.config.fit.model))
        self.data_options, self.model_options = vars(options.data), vars(options.model)

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; where it is that of a process group, it also ends the process.

    A thread of gloo may still hold the last tensor that it sent. If it lets go of it while the interpreter ends, C++
    aborts the process, and a run that has done all its work seems to have failed; so the interpreter does not end.

    Args:
        arguments: Command-line arguments; those of the process if left out.

    Returns:
        Exit status: 0; 2 for an error that the user can mend; 1 for one of this package (``--debug`` and
        ``BCO_DEBUG=1`` show the traceback of either); 128 plus the number of the signal for a run that was asked to
        stop and has saved.
    """
    status = _run(arguments)
    if arguments is None and is_in_a_group():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(arguments: Sequence[str] | None) -> int:
    _quiet_libraries()
    subprocess_script._launch_process_observer = watch_processes  # type: ignore[attr-defined]
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = [word for word in words if word != DEBUG]
    try:
        safety.refuse_secrets(given)
        with keeping_help(given):
            _dispatch(given)
    except PreemptedError as stopped:
        rank_zero_info(
            f"Stopped by {signal.Signals(stopped.signal_number).name} after optimizer step {stopped.step}; everything "
            f"is in {stopped.checkpoint}. The same command with --ckpt_path last goes on."
        )
        # Lightning's launcher kills the first process, which may still be at work, when another ends with an error.
        return int(stopped.code) if rank_zero_only.rank == 0 else 0  # type: ignore[arg-type, attr-defined]
    except SIGTERMException:  # before the first step there is nothing to save
        return 128 + signal.SIGTERM
    except Exception as error:
        if DEBUG in words or os.environ.get("BCO_DEBUG"):
            raise
        fault = in_words(error)
        print(f"error: {fault or _internal(error)}", file=sys.stderr)
        return 2 if fault else 1
    return 0


def _internal(error: Exception) -> str:
    """Names an error that is nobody's but ours by its kind and place; what it says may be the text of a user."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(Path(__file__).parents[1])] or frames
    place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    said = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
    return (
        f"internal error: {type(error).__name__}{said}{place}. Run the same command again with {DEBUG} for the "
        "traceback, and report it."
    )


def _dispatch(given: list[str]) -> None:
    command, rest = given[:1], given[1:]
    if command == ["export"]:
        _export(rest)
    elif command == ["plan"]:
        plan_command(rest)
    elif command == ["inspect"]:
        options, of_fit = split_arguments(rest)
        cli = _lightning_cli(DataCLI, ["fit", *of_fit])
        inspect_command(options, cli.config.fit, cli.data_options, cli.model_options)
    else:
        _lightning_cli(BCOCLI, given)


def _lightning_cli(kind: type[_CLI], arguments: list[str]) -> _CLI:
    with safety.refusals_as_errors():
        return kind(
            BCOModule,
            FeedbackDataModule,
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            parser_class=BCOArgumentParser,
            parser_kwargs={"prog": "python -m bco_lightning", "description": _DESCRIPTION},
            trainer_defaults={
                "use_distributed_sampler": False,
                "enable_model_summary": False,
                "max_epochs": 1,
                "num_sanity_val_steps": 0,  # seconds, for a forward pass that is the training step's own
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            args=arguments,
        )


def _export(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bco_lightning export",
        description="Write a folder that transformers (merged) or peft (adapter) load.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ckpt_path", type=Path, required=True, help="a run's folder, for its newest checkpoint, or a step's"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write; it must not exist yet")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the model's weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="weights of a whole model")
    options = parser.parse_args(arguments)
    export_checkpoint(options.ckpt_path, options.output_dir, merge=options.merge, dtype=options.dtype)
    print(f"exported: {options.output_dir} (its README.md says how to load it)")


def _quiet_libraries() -> None:
    """Hides remarks that a user of this package cannot act on."""
    for message in (
        r".*LeafSpec.*",  # lightning 2.6.6 with torch 2.13
        r".*gradient_checkpointing.*deprecated.*",  # peft 0.21 with transformers 5.23
        r"Found \d+ module\(s\) in eval mode.*",  # meant: dropout would blur the log-ratio
        r".*does not have many workers.*",  # rows are tokenized before training; collation is all that is left
        r".*litlogger.*",
        r"LightningCLI's args parameter is intended.*",  # it is given what the process was, without --debug
        r"It is recommended to use `self.log\(.*sync_dist=True\)`.*",  # a metric is summed when it is read
        r"Total length of `list` across ranks is zero.*",  # no rows are held out
        r"You are using a custom batch sampler .* for prediction.*",  # it gives every row
        r"You have overridden `on_before_batch_transfer`.*",  # the data module does not
        r"You're resuming from a checkpoint that ended before the epoch ended.*",  # the row order follows the step
        r"Already found a `peft_config`.*",  # an incoming adapter stands beside the one that is trained
    ):
        warnings.filterwarnings("ignore", message=message)
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(
            lambda record: not re.search(r"litlogger|weights_only|TPU available", record.getMessage())
        )
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        disable_progress_bar()
        for name in ("fabric", "pytorch"):
            logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
