"""The command line: ``fit``, ``validate``, ``test`` and ``predict`` by LightningCLI, and ``export``."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from bco_lightning.callbacks import KnownRewardTrial, PredictionWriter, RunCheckpoint, StepProgressBar
from bco_lightning.data import FeedbackDataModule
from bco_lightning.errors import CheckpointError, UserError
from bco_lightning.export import export_checkpoint
from bco_lightning.module import BCOModule

_DESCRIPTION = """Align language models from thumbs-up / thumbs-down feedback. Besides the commands below there is
`export`, which writes a checkpoint as a folder that transformers and peft load: see `export --help`."""


class BCOArgumentParser(LightningArgumentParser):
    """Suggests the option that was probably meant."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[misc]
        unknown = re.search(r"(?:accept option|nested key|[Uu]nrecognized arguments:|Key) '?(?:--)?([\w.]+)", message)
        if unknown and "xpected a" not in message:
            close = difflib.get_close_matches(unknown[1], _options_of(self), n=1, cutoff=0.7)
            message += f"\nDid you mean --{close[0]}?" if close else ""
        super().error(message, ex)


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
        """Writes ``config.yaml``."""
        super().setup(trainer, pl_module, "fit")


class BCOCLI(LightningCLI):
    """LightningCLI with this package's module, data and callbacks, and one folder of runs."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_folder", type=str, default="runs/bco", help="Each run gets a folder version_N in this one."
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(KnownRewardTrial, "known_reward")
        parser.add_lightning_class_args(PredictionWriter, "predictions")

    @override
    def _parse_ckpt_path(self) -> None:
        """Keeps what the user asked for: Lightning would put the checkpoint's hyperparameters over it."""

    @override
    def before_instantiate_classes(self) -> None:
        options = self.config[self.subcommand]
        if options.ckpt_path == "last":
            options.ckpt_path = str(newest_checkpoint(Path(options.run_folder)))
            rank_zero_info(f"checkpoint: {options.ckpt_path}")
        elif options.ckpt_path is not None and not Path(options.ckpt_path).exists():
            raise CheckpointError(options.ckpt_path, "expected a checkpoint or the word 'last', found no such file.")

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self.config_init[self.subcommand]
        if options.trainer.logger is None or options.trainer.logger is True:
            logger = TensorBoardLogger(options.run_folder, name="", version=self._version_of_checkpoint(options))
            kwargs["logger"] = logger if self.subcommand != "predict" else False
        return super().instantiate_trainer(**kwargs)

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
        return super()._instantiate_trainer(config, callbacks)

    def after_fit(self) -> None:
        """Says where everything is and what to type next."""
        log_dir = self.trainer.log_dir  # a broadcast: every process has to ask
        if not self.trainer.is_global_zero or log_dir is None:
            return
        run = Path(log_dir)
        checkpoint = run / "checkpoints" / "last.ckpt"
        alignment = run / "alignment.json"
        module = self.model
        print(
            f"\nRun folder   {run}\n"
            f"Checkpoint   {checkpoint} ({self.trainer.global_step} optimizer steps, "
            f"reward shift {module.reward_shift.value:.4f})\n"
            + (f"Alignment    {alignment}\n" if alignment.exists() else "")
            + f"\nNext:\n"
            f"  tensorboard --logdir {self.config[self.subcommand].run_folder}\n"
            f"  python -m bco_lightning export --ckpt_path {checkpoint} --output_dir exports/{run.name} --merge\n"
            f"  python -m bco_lightning predict --config {run / 'config.yaml'} --ckpt_path {checkpoint} "
            f"--data.predict_files FILE"
        )


def newest_checkpoint(run_folder: Path) -> Path:
    """The last checkpoint of the newest run in ``run_folder``.

    Raises:
        CheckpointError: If there is none.
    """
    found = sorted(run_folder.glob("version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(str(run_folder), "expected a run with checkpoints/last.ckpt to go on with, found none.")
    return found[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Command-line arguments; those of the process if left out.

    Returns:
        Exit status: 0, or 2 for an error that the user can mend. Set ``BCO_DEBUG=1`` to see its traceback.
    """
    _quiet_libraries()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["export"]:
            _export(given[1:])
        else:
            BCOCLI(
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
                },
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                seed_everything_default=0,
                args=None if arguments is None else given,
            )
    except UserError as error:
        if os.environ.get("BCO_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _export(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bco_lightning export",
        description="Write a folder that transformers (merged) or peft (adapter) load.",
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint file of a run")
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
        r"The dirpath has changed.*",  # a checkpoint is evaluated from elsewhere
        r"Checkpoint directory .* exists and is not empty.*",  # a run that goes on
        r"Already found a `peft_config`.*",  # an incoming adapter stands beside the one that is trained
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not re.search(r"litlogger|weights_only|TPU available", record.getMessage())
    )
