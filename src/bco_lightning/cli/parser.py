"""The parser of all commands: it suggests the option that was meant, and takes no objects from a config."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from bco_lightning.cli import safety
from bco_lightning.cli.plain_yaml import Refusal, load_measured
from bco_lightning.data import FeedbackDataModule
from bco_lightning.data.options import Source
from bco_lightning.errors import ConfigError
from bco_lightning.options import Options

_UNKNOWN = re.compile(
    r"(?:Group '([\w.]+)' does not )?(?:accept option|nested key|[Uu]nrecognized arguments:|Key) '?(?:--)?([\w.]+)"
)


class BCOArgumentParser(LightningArgumentParser):
    """Suggests the option that was probably meant, and takes no objects where only Python can give them."""

    @override
    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:
        if theclass is FeedbackDataModule:
            kwargs["skip"] = {*(kwargs.get("skip") or ()), "tokenizer"}
            kwargs["sub_configs"] = False  # a log's lines would be taken for a list of logs
        added: list[str] = super().add_class_arguments(theclass, *args, **kwargs)
        return added

    def add_flag(self, name: str, told: str) -> None:
        """Adds an option that takes no value."""
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
    def print_usage(self, file: Any = None) -> None:
        """Prints one line before an error: a hundred options are for the help."""
        print(f"usage: {self.prog.replace(' [options]', '')} [options]", file=file)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # type: ignore[misc]
        safety.refuse_import_named_in(message)
        if (unknown := _UNKNOWN.search(message)) and "xpected a" not in message:
            given = ".".join(filter(None, unknown.groups()))
            close = difflib.get_close_matches(given, _options_of(self), n=1, cutoff=0.7)
            message += f"\nDid you mean --{close[0]}?" if close else ""
        super().error(message, ex)


def refuse_misread_sources(data: Namespace) -> None:
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
