"""What a config file may not do: import code, write outside the working directory, or name web addresses.

A config may come from somebody else. Command line and environment are the user's own and may name what a config file
may not.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from jsonargparse import Namespace, set_loader, set_parsing_settings

from bco_lightning.cli import plain_yaml
from bco_lightning.cli.plain_yaml import Refusal, leaves_of, refusals_as_errors

ALLOWED_IMPORTS_VARIABLE = "BCO_ALLOWED_IMPORTS"
ALLOWED_IMPORTS = (
    "bco_lightning.callbacks",
    # jsonargparse looks up optional dataclasses too, by their shortest path and by their own.
    *(f"bco_lightning.{name}" for name in ("Columns", "LoraSettings", "PromptFeatures", "Rating", "Source")),
    *(f"bco_lightning.data.{name}" for name in ("Columns", "Rating", "Source")),
    "bco_lightning.data.options",
    "bco_lightning.options",
    "bco_lightning.parallel.strategy",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.fabric.plugins",  # where cluster environments and checkpoint plugins of lightning.pytorch are defined
)

_MAY_NAME_CLASSES = ("strategy", "accelerator", "profiler")
_READ_FROM = ("config", "ckpt_path", "data", "model")
_FROM_USER_ALONE = {("data", "cache_folder"), ("model", "cache_folder")}
_WEB_ADDRESS = re.compile(r"(?i:\s*https?:)")
_STRUCTURE = re.compile(r"(?:^|(?<=\.))(?:init_args|dict_kwargs|\d+)(?:\.|$)")

Chosen = list[tuple[str, set[str]]]
_granted_before: set[str] = set()


@contextlib.contextmanager
def safe_parsing() -> Iterator[None]:
    """Within it jsonargparse imports what is allowed alone; every YAML text is measured and searched for secrets."""
    try:
        with refusals_as_errors():
            _restrict_imports()
            set_loader("yaml", plain_yaml.load_without_secrets, exceptions=(yaml.YAMLError,))
            try:
                yield
            except ImportError as error:  # of groups of options jsonargparse makes no message of its own
                refuse_import_named_in(str(error))
                raise
    finally:
        # A path is handed over ever since a loader took one.
        set_loader("yaml", lambda text, path="": plain_yaml.load_unmeasured(text), exceptions=(yaml.YAMLError,))


# --- imports


def refuse_import_named_in(message: str) -> None:
    """Turns jsonargparse's message about an import that is not allowed into one that says what is."""
    refused = re.search(r"Importing '([^']+)' is not allowed", message)
    if refused:
        key = re.search(r'(?:Parser key "|^--)([^":]+)', message)
        _refuse_import(key[1] if key else "config", refused[1])


def _refuse_import(where: str, name: str) -> NoReturn:
    allowed = ", ".join([*ALLOWED_IMPORTS, *_granted_by_environment()])
    problem = f"expected a class of {allowed}; found {name}, which was not imported."
    remedy = f"To allow a package of your own, name it in the environment: {ALLOWED_IMPORTS_VARIABLE}=my_package"
    raise Refusal(where, problem, remedy)


def _restrict_imports() -> None:
    granted = set(_granted_by_environment())
    try:
        set_parsing_settings(
            import_path_denylist=["*", *sorted(_granted_before - granted)],
            import_path_allowlist=[*ALLOWED_IMPORTS, *sorted(granted)],
            instantiate_subclass_spec_in_any=False,  # a field of any type takes no class
            config_read_mode_fsspec_enabled=False,  # a config is a local file
        )
    except ValueError as error:
        raise Refusal(ALLOWED_IMPORTS_VARIABLE, f"expected import paths, found others ({error}).") from error
    _granted_before.update(granted)


def _granted_by_environment() -> list[str]:
    return [name for name in re.split(r"[\s,]+", os.environ.get(ALLOWED_IMPORTS_VARIABLE, "")) if name]


# --- places


def check_resolved(options: Namespace, arguments: Sequence[str]) -> None:
    """Refuses among resolved options what only the command line may name: places outside, web addresses, classes."""
    trainer, chosen = options.get("trainer") or {}, _chosen_by_user(arguments)
    with refusals_as_errors():
        for name in _MAY_NAME_CLASSES:
            if re.fullmatch(r"\w+(\.\w+)+", found := str(trainer.get(name))):
                _refuse_import(f"trainer.{name}", found)
        for path, leaf in leaves_of(options):
            if isinstance(leaf, (str, bool, os.PathLike)) and path[-1] not in ("class_path", "__path__"):
                _refuse_place(path, str(leaf), chosen)


def _refuse_place(path: tuple[str, ...], text: str, chosen: Chosen) -> None:
    """Refuses a place outside to write to, and data files on web servers, which this machine may reach alone."""
    asks_for_web = path == ("data", "image_urls") and text == "True"
    on_the_web = (path[0] == "data" and path[-1] != "name" and _WEB_ADDRESS.match(text)) or asks_for_web
    is_written = path[0] not in _READ_FROM or path in _FROM_USER_ALONE
    option = _STRUCTURE.sub("", ".".join(path[:2] if on_the_web else path)).rstrip(".")
    by_user = any(text in texts and f"{option}.".startswith(f"{name}.") for name, texts in chosen)
    if by_user or not (on_the_web or is_written):
        return
    if on_the_web:
        given = f"--{option}={'true' if asks_for_web else 'ADDRESS'}"
        problem = "expected files of this machine or of a storage service, found a web address."
        remedy = f"A config file may not name web addresses; give this one on the command line: {given}"
        raise Refusal(option, problem, remedy)
    if path in _FROM_USER_ALONE:
        problem = f"expected it on the command line alone, found {text!r} in a config file."
        risk = "What lies there is taken for what was computed here; whoever wrote the config could have put it there."
        raise Refusal(option, problem, risk)
    if _leads_out(text, Path.cwd().resolve()):
        problem = f"expected a place inside the working directory, found {text!r}."
        remedy = f"A config file may not name places outside it; give this one on the command line: --{option}={text}"
        raise Refusal(option, problem, remedy)


def _chosen_by_user(arguments: Sequence[str]) -> Chosen:
    """Options of the command line, without what only structures them, and the texts that stand in their values."""
    chosen = []
    for option, text in plain_yaml.options_in(arguments):
        with contextlib.suppress(yaml.YAMLError, ValueError):
            texts = {text, *(str(leaf) for _, leaf in leaves_of(plain_yaml.load_measured(text, option)))}
            chosen.append((_STRUCTURE.sub("", option.lstrip("-").rstrip("+")).rstrip("."), texts))
    return chosen


def _leads_out(text: str, root: Path) -> bool:
    """Whether a path would leave ``root``: absolute, by ``..``, by a link, a URL, or a variable that loggers expand."""
    if database := re.fullmatch(r"sqlite:///([\w./-]+)", text):  # of MLflow, by default
        text = database[1]
    if "://" in text or "$" in text or text.startswith("~"):
        return True
    try:
        return not (root / text).resolve().is_relative_to(root)
    except (OSError, ValueError, RuntimeError):  # no path at all, or links in a circle
        return True
