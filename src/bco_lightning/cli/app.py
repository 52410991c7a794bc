"""What a command line leads to: one command, and its errors in words."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from lightning.pytorch.strategies.launchers import subprocess_script
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed
from transformers.utils.logging import disable_progress_bar

from bco_lightning.cli.faults import in_words, watch_processes
from bco_lightning.cli.help import COMMANDS, keeping_help
from bco_lightning.cli.plain_yaml import refuse_secrets
from bco_lightning.cli.plan import plan_command
from bco_lightning.cli.run import BCOCLI, BCOArgumentParser, InspectCLI
from bco_lightning.errors import ConfigError, PreemptedError, printable
from bco_lightning.inspection.run_report import report_runs
from bco_lightning.models.memory import PlanOptions
from bco_lightning.parallel.signals import early, requeue_slurm_job
from bco_lightning.places import recipe
from bco_lightning.serving.chat import chat
from bco_lightning.serving.export import export_checkpoint

DEBUG = "--debug"
_format_warning = warnings.formatwarning
_COMPLETION = """Print a script by which a shell completes commands and options of `bco-lightning`; in bash:
`eval "$(bco-lightning completion bash)"`."""
_PLAN = "Work out what a run would take of each GPU's memory. No weight is loaded."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; where it is that of a process group, it also ends the process.

    Args:
        arguments: Command-line arguments; those of the process if left out.

    Returns:
        Exit status: 0; 2 for an error that the user can mend; 1 for one of this package (``--debug`` and
        ``BCO_DEBUG=1`` show the traceback of either); 128 plus the number of the signal for a run that was asked to
        stop and has saved.
    """
    status = _run(list(sys.argv[1:] if arguments is None else arguments))
    # A thread of gloo may still hold the last tensor that it sent. Letting go of it while the interpreter ends, it
    # aborts the process, and a run that has done all its work seems to have failed; so the interpreter does not end.
    if arguments is None and distributed.is_initialized():
        atexit._run_exitfuncs()  # os._exit leaves them out, and Python has no public name for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(words: list[str]) -> int:
    _quiet_libraries()
    # Lightning offers no way to choose who watches the processes that it starts: see faults.py.
    subprocess_script._launch_process_observer = watch_processes  # type: ignore[attr-defined]
    given, is_first = [word for word in words if word != DEBUG], getattr(rank_zero_only, "rank", 0) == 0
    try:
        if not early.installed:
            early.install()
        early.leave_at_once()
        refuse_secrets(given)
        given = _with_recipes(given)
        with keeping_help(given):
            _dispatch(given)
    except PreemptedError as stopped:
        if not stopped.checkpoint and stopped.signal_number == signal.SIGUSR1 and is_first and given[:1] == ["fit"]:
            requeue_slurm_job()
        rank_zero_info(f"Stopped by {signal.Signals(stopped.signal_number).name} {_said_of(stopped)}")
        # Lightning's launcher kills the first process, which may still be at work, when another ends with an error.
        return 128 + stopped.signal_number if is_first else 0
    except SIGTERMException:  # before the first step there is nothing to save
        return 128 + signal.SIGTERM
    except Exception as error:
        if DEBUG in words or os.environ.get("BCO_DEBUG"):
            raise
        fault = in_words(error)
        print(f"error: {fault or _internal(error)}", file=sys.stderr)
        return 2 if fault else 1
    finally:
        early.remove()
    return 0


def _with_recipes(words: list[str]) -> list[str]:
    """The command line with the file of each recipe that ``--config`` names."""
    found = []
    for before, word in zip(["", *words], words):  # noqa: B905 - each with the one before it
        option, equals, name = word.partition("=")
        if before in ("-c", "--config"):
            word = recipe(word)
        elif option in ("-c", "--config") and equals:
            word = f"{option}={recipe(name)}"
        found.append(word)
    return found


def _said_of(stopped: PreemptedError) -> str:
    if not stopped.checkpoint:
        return "outside of training. The same command finds what is saved and what is in the cache folder."
    said = f"after optimizer step {stopped.step}; everything is in {stopped.checkpoint}."
    return f"{said} The same command with --ckpt_path last goes on."


def _internal(error: Exception) -> str:
    """Names an error that is nobody's but ours by its kind and place; what it says may be the text of a user."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [frame for frame in frames if frame[0].is_relative_to(Path(__file__).parents[1])] or frames
    place = f" at {ours[-1][0].name}:{ours[-1][1]}" if ours else ""
    said = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
    remedy = f"Run the same command again with {DEBUG} for the traceback, and report it."
    return f"internal error: {type(error).__name__}{said}{place}. {remedy}"


def _dispatch(given: list[str]) -> None:
    command, *others = given or [""]
    parser = BCOArgumentParser(prog=f"python -m bco_lightning {command}")
    if command == "inspect":
        InspectCLI(others)
    elif command == "export":
        parser.add_function(export_checkpoint, merge="Merge the adapter into the model's weights.")
        options = parser.parsed(others)
        export_checkpoint(**options)
        print(f"exported: {options['output_dir']} (its README.md says how to load it)")
    elif command == "report":
        parser.add_argument("runs", nargs="+", type=str, help="Folders of runs, RUN_FOLDER/version_N.")
        parser.add_function(report_runs, "runs", overwrite="Replace the page, if it is one of this command.")
        report_runs(**parser.parsed(others))
    elif command == "chat":
        parser.add_function(chat, blind="Show answers as those of A and B, in random order, until you ask who is who.")
        chat(**parser.parsed(others))
    elif command == "plan":
        parser.description = _PLAN
        parser.add_class_arguments(PlanOptions, skip={"gradient_checkpointing"})
        parser.add_argument(
            "--gradient_checkpointing", nargs="?", const=True, default=False, type=bool | Literal["selective"],
            help="Compute activations again in the backward pass; selective, but for what matrix products gave.",
        )  # fmt: skip
        plan_command(**parser.parsed(others))
    elif command == "completion":
        parser.description = _COMPLETION
        parser.add_argument("shell", type=Literal["bash", "zsh", "tcsh"], help="Whose completion it is to be.")
        print(_completion(parser.parsed(others)["shell"]))
    else:
        BCOCLI(given)


def _completion(shell: str) -> str:
    """A script by which a shell completes commands and the options that their help names."""
    if not find_spec("shtab"):
        remedy = "Install it: pip install 'bco-lightning[completion]'."
        raise ConfigError("completion", "expected the package shtab, found none.", remedy)
    import shtab

    parser = argparse.ArgumentParser("bco-lightning")
    commands = parser.add_subparsers()
    for name in COMMANDS:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as told:
            _dispatch([name, "--help"])
        command = commands.add_parser(name, help=name)
        for option in sorted({DEBUG, *re.findall(r"^ +(?:-\w \w+, )?(--[\w.]+)", told.getvalue(), re.MULTILINE)}):
            command.add_argument(option)
    return str(shtab.complete(parser, shell))


def _say_of_thread(failed: threading.ExceptHookArgs) -> None:
    """What a thread of a library meets, such as a full disk, in words where it can be; else Python's traceback."""
    if failed.exc_value is not None and (fault := in_words(failed.exc_value)):
        print(printable(f"warning: {fault}"), file=sys.stderr)
    else:
        threading.__excepthook__(failed)


class _PrintableRecord(logging.LogRecord):
    """What any library logs, without the control characters of names that it found in files."""

    def getMessage(self) -> str:  # noqa: N802
        return printable(re.sub(r"\x1b\[[\d;]*m", "", super().getMessage()))  # without colors, too


def _quiet_libraries() -> None:
    """Hides what none of the libraries should do to a terminal; their remarks, see callbacks/remarks.py."""
    threading.excepthook = _say_of_thread
    logging.setLogRecordFactory(_PrintableRecord)
    warnings.formatwarning = lambda *told, **more: printable(_format_warning(*told, **more))
    if getattr(rank_zero_only, "rank", 0) != 0:
        disable_progress_bar()
        for name in ("fabric", "pytorch"):
            logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
