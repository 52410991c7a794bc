"""The commands that LightningCLI runs, ``inspect``, which takes the same options, and the parser of all commands."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from shlex import quote
from typing import Any, NoReturn, cast

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from typing_extensions import override

from bco_lightning.callbacks import (
    FiniteGuard,
    MetricsFile,
    PredictionWriter,
    RunCheckpoint,
    SampleWriter,
    SpeedMonitor,
    StepProgressBar,
)  # fmt: skip
from bco_lightning.callbacks.loggers import METRICS_FILE, goes_on_when_full, telling, where_to_look
from bco_lightning.callbacks.refusals import names_logged
from bco_lightning.checkpoints.best import BestSteps
from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.checkpoints.format import use_verified_io
from bco_lightning.checkpoints.manifest import BEST, WORDS, resolve_checkpoint, verify_checkpoint
from bco_lightning.checkpoints.runs import LOCK_FILE, claim_run, hold_run
from bco_lightning.cli import safety
from bco_lightning.cli.help import COMMANDS
from bco_lightning.cli.plain_yaml import Refusal, load_measured, refusals_as_errors
from bco_lightning.cli.wording import in_one_line
from bco_lightning.data import FeedbackDataModule
from bco_lightning.data.options import Source
from bco_lightning.demo.trial import KnownRewardTrial
from bco_lightning.errors import CheckpointError, ConfigError, printable
from bco_lightning.identity import git_revision, versions
from bco_lightning.inspection.inspect import inspect_command
from bco_lightning.inspection.run_record import RunRecord
from bco_lightning.inspection.run_report import REPORT_FILE, page_of_runs, print_metrics, print_outcome
from bco_lightning.module import BCOModule
from bco_lightning.options import POSITIVE, ModelOptions, Options
from bco_lightning.parallel.strategy import named_strategy
from bco_lightning.places import require_free

_DESCRIPTION = """Align language models from thumbs-up / thumbs-down feedback. Besides the commands below there are
`inspect`, which reports on the data of a config before it is trained on, `report`, which makes a page on a run or
compares several, `export`, which writes a checkpoint as a folder that transformers and peft load, `chat`, which lets
you talk to it and rate what it says, and `plan`, which works out what a run would take of each GPU's memory: see
`inspect --help` and so on. Any command takes --debug, which shows the traceback of an error."""
_INSPECT = """Read the data as `fit` would and report on it, before GPU hours are spent: rows read, used, left out and
cut, thumbs, lengths, tokens, steps and time, prompts of either class, length bias, personal data. No weight is loaded,
except for model.importance_weights. It takes every option of `fit`."""
_FROM_PYTHON = ("train", "validation", "test", "predict")  # options of the data module that hold objects


class BCOArgumentParser(LightningArgumentParser):
    """Says in one line what is wrong, takes no option cut short, and no objects where only Python can give them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    @override
    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:
        if theclass is FeedbackDataModule:
            kwargs["skip"] = {*(kwargs.get("skip") or ()), "tokenizer", *_FROM_PYTHON}
            kwargs["sub_configs"] = False  # a log's lines would be taken for a list of logs
        if theclass is BCOModule:
            kwargs["skip"] = {*(kwargs.get("skip") or ()), "model", "tokenizer"}
        added: list[str] = super().add_class_arguments(theclass, *args, **kwargs)
        return added

    def add_function(self, function: Callable[..., Any], *skip: str, **flags: str) -> None:
        """Adds what a function takes; those of its arguments that are ``flags``, with their help, take no value."""
        self.add_function_arguments(function, skip={*skip, *flags})
        self.description = str(function.__doc__).partition("\n")[0]
        for name, told in flags.items():
            self.add_argument(f"--{name}", action="store_true", help=told)

    def parsed(self, arguments: list[str]) -> dict[str, Any]:
        """The options of a command line."""
        with safety.safe_parsing():
            return dict(vars(self.parse_args(arguments)))

    @override
    def instantiate(self, namespace: Namespace, instantiate_groups: bool = True, **options: Any) -> Namespace:
        options["instantiators"] = [(_made, Options, True)]
        return super().instantiate(namespace, instantiate_groups, **options)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[misc]
        """Leaves with one line; a hundred options are for the help."""
        if "is not accepted" not in message:  # or a misspelt one would be sought in classes that may not be imported
            safety.refuse_import_named_in(message)
        if not self.exit_on_error:  # it is that of a part, such as a class
            super().error(message, ex)
        parser: Any = getattr(ex, "subcommand_parser", self)
        where, problem = in_one_line(message, sorted(_options_of(parser)), COMMANDS)
        raise Refusal(where, problem, f"See {parser.prog.replace(' [options]', '')} --help.")


def _refuse_misread_sources(data: Namespace) -> None:
    """Ends with what is wrong with a list of sources that was taken for a text, and so for the name of a file."""
    for name in ("train_files", "validation_files", "test_files", "predict_files"):
        given = data.get(name)
        for text in given if isinstance(given, list) else [given]:
            # A file may be called like one, but hardly with these beginnings.
            if isinstance(text, str) and text.lstrip().startswith(("[", "{", "- ")):
                with contextlib.suppress(yaml.YAMLError):
                    sources = load_measured(text, f"data.{name}")
                    parser = BCOArgumentParser(prog="python -m bco_lightning")
                    parser.add_argument(f"--data.{name}", type=list[str | Source])
                    parser.parse_object({f"data.{name}": sources})


def _made(kind: type, **values: Any) -> Any:
    """Makes what is part of an option; jsonargparse would hide an error, and try what else the option could hold."""
    try:
        return kind(**values)
    except ConfigError as error:
        raise Refusal(error.where, error.problem, error.remedy) from None


def _options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Names of a parser's options and of those of its subcommands; argparse has no public list of them."""
    options: set[str] = set()
    for action in parser._actions:
        options |= {option.lstrip("-") for option in action.option_strings}
        if isinstance(action, argparse._SubParsersAction):
            options = options.union(*(_options_of(child) for child in action.choices.values()))
    return options


class RunConfig(SaveConfigCallback):
    """Writes the resolved config once data and model are there, so that a failed start leaves no folder."""

    run: Path | None = None  # the run's folder, wherever loggers write; in the first process alone

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Waits for :meth:`on_fit_start`."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Writes ``config.yaml``, and ``provenance.json``: seed, versions, git revision and digests of the inputs."""
        self.config.ckpt_path = None  # or this config would go on from a checkpoint that may be gone
        if self.run is not None:
            with written_whole(self.run / self.config_filename) as partial:
                self.parser.save(self.config, str(partial), skip_unset=False, multifile=False)
            provenance = {
                "seed": pl_module.hparams["seed"],
                "python": platform.python_version(),
                "versions": versions(),
                "git_revision": git_revision(),
                "fingerprints": pl_module.fingerprints(),
                "feedback": {counts.name: counts.by_source for counts in cast(Any, trainer).datamodule.counts},
            }
            text = json.dumps(provenance, indent=1, sort_keys=True, ensure_ascii=False)
            with written_whole(self.run / "provenance.json") as partial:
                partial.write_text(text + "\n", encoding="utf-8")


class BCOCLI(LightningCLI):
    """LightningCLI with this package's module, data and callbacks, and one folder of runs."""

    _claimed: list[Path]  # folders of loggers
    _step_was_chosen = False  # not named by the user
    run: Path | None = None  # its folder; in the first process alone

    def __init__(self, arguments: list[str], **options: Any) -> None:
        self._claimed, self._first_word = [], arguments[0] if arguments else ""
        with refusals_as_errors():
            super().__init__(
                BCOModule,
                FeedbackDataModule,
                save_config_callback=RunConfig,
                parser_class=BCOArgumentParser,
                trainer_defaults={
                    "use_distributed_sampler": False,
                    "enable_model_summary": False,
                    "num_sanity_val_steps": 0,  # seconds, for a forward pass that is the training step's own
                },
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                seed_everything_default=0,
                args=arguments,
                **{"parser_kwargs": {"prog": "python -m bco_lightning", "description": _DESCRIPTION}, **options},
            )

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is asked for, since the options of each take a third of a second to put together."""
        known = super().subcommands()
        return {self._first_word: known[self._first_word]} if self._first_word in known else known

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        told = "Each run gets a folder version_N in this one."
        parser.add_argument("--run_folder", type=str, default="runs/bco", help=told)
        told = (
            "Seconds to wait for another process before the run ends with an error; the others also wait while the "
            "first one writes a checkpoint and reads it back."
        )
        parser.add_argument("--process_timeout", type=float, default=600.0, help=told)
        parser.add_class_arguments(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(FiniteGuard, "guard")
        parser.add_lightning_class_args(KnownRewardTrial, "known_reward")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(SampleWriter, "samples")

    @override
    def setup_parser(self, add_subcommands: bool, *args: Any) -> None:
        super().setup_parser(add_subcommands, *args)
        if add_subcommands:  # Lightning knows of its own alone
            self.parser.usage = f"%(prog)s [-c CONFIG] {{{','.join(COMMANDS)}}} ..."

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with safety.safe_parsing():
            super().parse_arguments(parser, args)
            options = self.config.get(str(self.config.get("subcommand")), self.config)
            _refuse_misread_sources(options.data)
        safety.check_resolved(options, args)
        POSITIVE.check("process_timeout", options.process_timeout)
        if options.trainer.max_epochs is None:  # which Lightning takes for 1000 if there is no other end
            options.trainer.max_epochs = 1 if options.trainer.max_steps == -1 else -1
        options.run_folder = os.path.expanduser(os.path.expandvars(options.run_folder))  # noqa: PTH111
        options.weights_only = True  # Lightning's own default would unpickle whatever a checkpoint holds
        self._shows_metrics = bool(options.get("verbose"))
        if self._shows_metrics:
            options.verbose = False
        if options.ckpt_path is not None and self.config.get("subcommand"):
            options.ckpt_path = self._chosen_checkpoint(options.ckpt_path, Path(options.run_folder))
            if options.ckpt_path and options.data.template_date is None:  # or rows would be read twice
                told = verify_checkpoint(Path(options.ckpt_path), share=None).get("fingerprints", {})
                options.data.template_date = told.get("template_date")

    def _chosen_checkpoint(self, asked: str, run_folder: Path) -> str | None:
        """The folder that ``last``, ``best``, ``auto`` or a path means."""
        place = Path("last" if asked == "auto" else asked)
        if place.name not in WORDS and not place.exists():
            known = "the word 'last', 'best' or 'auto'"
            raise CheckpointError(asked, f"expected a checkpoint, or {known}, found no such file.")
        try:
            # By sizes alone: bytes are compared when they are read, once, by processes together.
            found = resolve_checkpoint(
                place, lambda error: rank_zero_info(f"checkpoint: skipped {error}"), None, run_folder
            )
        except CheckpointError as error:
            if asked != "auto":
                raise
            rank_zero_info(f"checkpoint: {error} Starting a new run, as 'auto' says.")
            return None
        self._step_was_chosen = found != place and place.name != BEST
        rank_zero_info(f"checkpoint: {found}")
        return str(found)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        options = self.config_init[self.subcommand]
        asked = options.trainer
        if by_default := asked.logger is None or asked.logger is True:
            kwargs["logger"] = False
        logs = by_default and self.subcommand != "predict"
        if asked.default_root_dir is None:  # or callbacks and profilers would write into the working folder
            kwargs["default_root_dir"] = options.run_folder
        if isinstance(asked.strategy, str):
            kwargs["strategy"] = named_strategy(asked.strategy)
        callbacks = [asked.callbacks] if not isinstance(asked.callbacks, (list, type(None))) else asked.callbacks or []
        if asked.barebones:
            remedy = "What a run logs, shows and saves takes no time to speak of."
            raise ConfigError("trainer.barebones", "expected false from the command line, found true.", remedy)
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if asked.enable_progress_bar is not False and not has_bar:
            callbacks = [*callbacks, StepProgressBar()]
        if asked.enable_checkpointing is not False:
            callbacks = [*callbacks, options.checkpoint]
        trainer = super().instantiate_trainer(**kwargs, callbacks=[*callbacks, SpeedMonitor()])
        use_verified_io(trainer.strategy, may_fall_back=self._step_was_chosen)
        if hasattr(trainer.strategy, "_timeout"):  # of the process group; half an hour, if left alone
            trainer.strategy._timeout = timedelta(seconds=options.process_timeout)
        self._claim_csv_folders(trainer, self.config[self.subcommand].trainer.logger)
        # Known is only now which process is the first of all; the others are told when they need it.
        if trainer.is_global_zero and not asked.fast_dev_run and (self.subcommand == "fit" or logs):
            self._take_run_folder(trainer, options)
        if not asked.fast_dev_run:
            self._take_loggers(trainer, options, logs)
        return trainer

    def _claim_csv_folders(self, trainer: Trainer, asked: Any) -> None:
        """Numbers the folders of CSVLoggers like those of runs; two that start at once would take the same.

        A CSVLogger removes what is there, wherever a config has it write.
        """
        if not trainer.is_global_zero:
            return
        configs, loggers = asked if isinstance(asked, list) else [asked], list(trainer.loggers)
        for place, (config, logger) in enumerate(zip(configs, loggers, strict=False)):
            if type(logger) is CSVLogger and config.init_args.version is None:
                self._claimed.append(claim_run(Path(str(logger.save_dir), str(logger.name))))
                loggers[place] = CSVLogger(**{**vars(config.init_args), "version": self._claimed[-1].name})
            elif isinstance(logger, CSVLogger):
                for name in (ExperimentWriter.NAME_METRICS_FILE, ExperimentWriter.NAME_HPARAMS_FILE):
                    require_free("trainer.logger", Path(logger.log_dir) / name)
        trainer.loggers = loggers

    def _take_loggers(self, trainer: Trainer, options: Any, by_default: bool) -> None:
        """In every process, or they would wait for each other."""
        if by_default:
            version = self.run.name if self.run else ""
            trainer.logger = TensorBoardLogger(options.run_folder, name="", version=version)
        for logger in trainer.loggers:
            goes_on_when_full(logger)
        if self.subcommand == "fit":
            trainer.loggers = [*trainer.loggers, MetricsFile(self.run or options.run_folder)]

    def _take_run_folder(self, trainer: Trainer, options: Any) -> None:
        """A run goes on, and is evaluated, in its own folder."""
        runs, run = Path(options.run_folder), Path(options.ckpt_path or "").parent.parent
        goes_on = options.ckpt_path is not None and run.parent.resolve() == runs.resolve()
        self.run = run if goes_on else claim_run(runs)
        options.checkpoint.run_folder = str(self.run)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunConfig):
                callback.run = self.run
        if self.subcommand == "fit":
            hold_run(self.run)

    @override
    def _run_subcommand(self, subcommand: str) -> None:  # Lightning has no hook for a run that has failed
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            with contextlib.suppress(OSError):  # other runs are in the folder of runs
                self._discard_unstarted_run()
            raise

    def _discard_unstarted_run(self) -> None:
        """Removes the folder that was made before anybody looked at data and model, if nothing else is in it."""
        contents = list(self.run.iterdir()) if self.run is not None and self.run.is_dir() else []
        if all(path.name == LOCK_FILE or path.name.startswith("events.out.tfevents") for path in contents):
            for path in contents:
                path.unlink()
            if self.run is not None:
                os.removedirs(self.run)
        for folder in self._claimed:
            with contextlib.suppress(OSError):
                os.removedirs(folder)

    def before_predict(self) -> None:
        """Refuses a place for scores that is taken before any row is read."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PredictionWriter):
                callback.setup(self.trainer, self.model, "predict")

    def after_validate(self) -> None:
        """Prints what Lightning would, in the order of docs/reading_a_run.md and with four digits."""
        if self._shows_metrics and self.trainer.is_global_zero:
            print_metrics(self.trainer.callback_metrics, names_logged(self.trainer), Console())

    after_test = after_validate

    def after_fit(self) -> None:
        """Says where everything is and what to type next."""
        if (run := self.run) is None:
            return
        if (run / METRICS_FILE).exists():
            record = RunRecord.read(run)
            print_outcome(record, Console())
            with telling(page := run / REPORT_FILE), written_whole(page, replaces=True) as partial:
                partial.write_text(page_of_runs([record]), encoding="utf-8")
        told = [f"\nRun folder   {run}"]
        saving = [callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoint)]
        saved, best = (saving[0].saved, saving[0].best) if saving else (None, BestSteps())
        if saved is not None:
            steps = f"{self.trainer.global_step} optimizer steps, reward shift {self.model.reward_shift.value:.4f}"
            told.append(f"Checkpoint   {saved} ({steps})")
        if best.step is not None:
            value = f"{best.monitor} {best.values[best.step]:.4f}"
            told.append(f"Best step    {best.step} ({value}): --ckpt_path {run / BEST}")
        for name, file in (("Alignment", "alignment.json"), ("Report", REPORT_FILE)):
            if (run / file).exists():
                told.append(f"{name:12} {run / file}")
        commands = where_to_look(self.trainer.loggers)
        if saved is not None:
            at_best = run / BEST if best.step not in (None, self.trainer.global_step) else run
            folder, command = quote(str(at_best)), "python -m bco_lightning"
            commands += [
                f"{command} export --ckpt_path {folder} --output_dir {quote(f'exports/{run.name}')} --merge",
                f"{command} predict --config {quote(str(run / 'config.yaml'))} --run_folder {quote(str(run.parent))} "
                f"--ckpt_path {folder} --data.predict_files FILE",
            ]
        if commands:
            told.append("\n  ".join(["\nNext:", *commands]))
        print(printable("\n".join(told)))


class InspectCLI(BCOCLI):
    """Parses and checks what ``fit`` would run with, and reports on its data instead; there is no trainer."""

    def __init__(self, arguments: list[str]) -> None:
        told = {"prog": "python -m bco_lightning inspect", "description": _INSPECT}
        super().__init__(arguments, run=False, parser_kwargs=told)
        options = {name: self.config[name] for name in ("report", "examples", "hide_examples", "overwrite")}
        inspect_command(self.data_options, self.model_options, vars(self.config.trainer), **options)

    @override
    def add_arguments_to_parser(self, parser: Any) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_method_arguments(Trainer, "fit", skip=self.subcommands()["fit"])  # the config of a run has them
        flags = {
            "hide_examples": "Show no row's text, neither here nor on the page.",
            "overwrite": "Replace the page, if it is one of this command.",
        }
        parser.add_function(inspect_command, "data_options", "model_options", "trainer_options", **flags)

    @override
    def instantiate_classes(self) -> None:
        """Makes the arguments of data module and module alone."""
        parser = BCOArgumentParser()
        parser.add_class_arguments(FeedbackDataModule, "data", fail_untyped=False, instantiate=False)
        parser.add_class_arguments(BCOModule, "model", fail_untyped=False, instantiate=False)
        options = parser.instantiate(Namespace(data=self.config.data, model=self.config.model))
        self.data_options, self.model_options = vars(options.data), vars(options.model)
        ModelOptions(**self.model_options)  # refuses what fit would refuse
