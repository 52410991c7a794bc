"""Answer ``--help`` and misspelt options before PyTorch is imported, from texts that ship with the package.

``help_texts.json`` holds, for each command, what argparse's formatter was given to lay out; laying it out again, for
the terminal at hand, takes the standard library alone. It is used only with the versions of Lightning and jsonargparse
and with the options that it was made from; otherwise the parser answers. ``make help-texts`` makes it again.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

COMMANDS = ("fit", "validate", "test", "predict", "inspect", "export", "plan")
FILE = Path(__file__).with_name("help_texts.json")
_SOURCE = Path(__file__).parent
_WITH_OPTIONS = (
    "cli.py", "inspection/inspect_command.py",
    "planning/plan_command.py", "planning/memory_plan.py", "planning/model_shape.py",
    "module.py", "optimizers.py", "models/language_model.py",
    "data/datamodule.py", "data/conflicts.py", "data/feedback_row.py", "data/loading.py", "data/source.py",
    "data/tokenization/length_limits.py", "data/tokenization/row_tokenizer.py",
)  # fmt: skip


def answer(arguments: Sequence[str]) -> int | None:
    """Prints help, or names an option that does not exist, if that is all there is to do.

    Args:
        arguments: The command line.

    Returns:
        Exit status 0 after help and 2 after an error; ``None`` for anything else, and where the packaged texts are not
        those of what is installed.
    """
    arguments = [word for word in arguments if word != "--debug"]
    command = arguments[0] if arguments[:1] and arguments[0] in COMMANDS else ""
    rest = arguments[1:] if command else arguments
    asks_for_help = rest in (["--help"], ["-h"])
    if not asks_for_help and command in ("", "inspect", "export", "plan"):
        return None
    packaged = _packaged()
    if packaged is None:
        return None
    layout = packaged[command]
    if asks_for_help:
        sys.stdout.write(laid_out(layout))
        return 0
    unknown = _unknown_options(rest, layout)
    if not unknown or _holds_secret(arguments):
        return None
    sys.stderr.write(laid_out(layout, usage_alone=True))
    sys.stderr.write(f"tip: For details of accepted options run: {layout['prog'].replace(' [options]', '')} --help\n")
    sys.stderr.write(f"error: unrecognized arguments: {' '.join(unknown)}\n")
    options = {flag.lstrip("-") for argument in layout["arguments"].values() for flag in argument["flags"]}
    close = difflib.get_close_matches(unknown[0].lstrip("-").partition("=")[0], options, n=1, cutoff=0.7)
    sys.stderr.write(f"Did you mean --{close[0]}?\n" if close else "")
    return 2


def _packaged() -> dict[str, Any] | None:
    """The layouts of all commands, if they are those of what is installed."""
    try:
        packaged = json.loads(FILE.read_text(encoding="utf-8"))
        if packaged["made_from"] != made_from():
            return None
    except (OSError, ValueError, KeyError, PackageNotFoundError):
        return None
    shared, commands = packaged["arguments"], packaged["commands"]
    for layout in commands.values():
        layout["arguments"] = {name: shared[number] for name, number in layout["arguments"].items()}
    return commands  # type: ignore[no-any-return]


def made_from() -> dict[str, str]:
    """Versions of the libraries that write the help, and a digest of this package's part of it.

    The digest is one of docstrings, fields and constructors of classes, of named choices, and of the command line's own
    file.
    """
    digest = hashlib.sha256()
    for path in [*(_SOURCE / name for name in _WITH_OPTIONS), *sorted((_SOURCE / "callbacks").glob("*.py"))]:
        for text in _option_texts(path):
            digest.update(text.encode() + b"\0")
    return {name: version(name) for name in ("lightning", "jsonargparse")} | {"options": digest.hexdigest()}


def _option_texts(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if path.name in ("cli.py", "inspect_command.py", "plan_command.py"):
        yield text
        return
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and "Literal[" in ast.unparse(node):
            yield ast.unparse(node)
        if isinstance(node, ast.ClassDef):
            yield ast.get_docstring(node) or ""
            for part in node.body:
                if isinstance(part, ast.AnnAssign):
                    yield "\n".join(lines[part.lineno - 1 : part.end_lineno])
                elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    yield "\n".join(lines[part.lineno - 1 : part.body[0].lineno - 1])


# --- laying out


class _Formatter(argparse.HelpFormatter):
    """Lays out arguments whose help is already written out."""

    def _expand_help(self, action: argparse.Action) -> str:
        return action.help or ""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return getattr(action, "heading", None) or super()._format_action_invocation(action)


class _Argument(argparse.Action):
    """An argument to be shown, not to be parsed."""

    def __init__(self, packaged: dict[str, Any]) -> None:
        super().__init__(packaged["flags"], packaged["name"], packaged["nargs"], help=packaged["help"])
        self.required = packaged["required"]
        self.metavar, self.heading = packaged["metavar"], packaged["heading"]
        self._inner = [_Argument(inner) for inner in packaged["inner"]]

    def _get_subactions(self) -> list[_Argument]:
        return self._inner


def laid_out(layout: dict[str, Any], usage_alone: bool = False) -> str:
    """The help of a command as its own parser would print it to this terminal.

    Args:
        layout: What :func:`record` made of it.
        usage_alone: The usage that goes before an error, and nothing else.

    Returns:
        Lines of text.
    """
    arguments = {name: _Argument(packaged) for name, packaged in layout["arguments"].items()}
    for argument in arguments.values() if usage_alone else ():
        argument.required = False  # as jsonargparse has it, since a config may give what is required
    formatter = _Formatter(layout["prog"])
    formatter.add_usage(None, [arguments[name] for name in layout["usage"]], [])
    for item in [] if usage_alone else layout["items"]:
        if isinstance(item, str):
            formatter.add_text(item)
            continue
        formatter.start_section(item["title"])
        for text in item["texts"]:
            formatter.add_text(text)
        formatter.add_arguments([arguments[name] for name in item["arguments"]])
        formatter.end_section()
    return formatter.format_help()


def _unknown_options(rest: Sequence[str], layout: dict[str, Any]) -> list[str]:
    """The first option that no parser would take, as one word or two; options inside of a class's are not judged."""
    flags = {flag for argument in layout["arguments"].values() for flag in argument["flags"]}
    for number, word in enumerate(rest):
        if word == "--":
            break
        name = word.partition("=")[0]
        if not word.startswith("--") or " " in word or any(flag.startswith(name) for flag in flags):
            continue
        parts = name.split(".")
        outer = [".".join(parts[: length + 1]) for length in range(len(parts) - 1)]
        if not any(_takes_a_class(flag, flags) for flag in outer):
            value = rest[number + 1 : number + 2]
            return [word, *(value if value and "=" not in word and not value[0].startswith("-") else [])]
    return []


def _takes_a_class(flag: str, flags: set[str]) -> bool:
    """Whether options may follow below ``flag`` that are not listed."""
    return flag in flags and not any(other.startswith(f"{flag}.") and other != f"{flag}.help" for other in flags)


def _holds_secret(arguments: Sequence[str]) -> bool:
    from bco_lightning import config_safety
    from bco_lightning.errors import ConfigError

    try:
        config_safety.refuse_secrets(arguments)
    except ConfigError:
        return True
    return False


# --- making


def record(command: str) -> tuple[str, dict[str, Any]]:
    """Asks the real command line for help.

    Args:
        command: One of :data:`COMMANDS`, or nothing for the help of all.

    Returns:
        What it printed, and what it laid out to print that.
    """
    from unittest import mock

    from bco_lightning.cli import main

    layouts: list[dict[str, Any]] = [{}]
    format_usage, format_help = argparse.HelpFormatter._format_usage, argparse.HelpFormatter.format_help

    def recording_usage(formatter: Any, usage: Any, actions: Any, *rest: Any) -> str:
        layouts[-1] = {"usage": [_name(action) for action in actions if action.help != argparse.SUPPRESS]}
        return format_usage(formatter, usage, actions, *rest)

    def recording_help(formatter: Any) -> str:
        text = format_help(formatter)
        layouts[-1] |= _layout(formatter)
        return text

    printed = io.StringIO()
    with (
        mock.patch.object(argparse.HelpFormatter, "_format_usage", recording_usage),
        mock.patch.object(argparse.HelpFormatter, "format_help", recording_help),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main([*([command] if command else []), "--help"])
    return printed.getvalue(), layouts[-1]


def _layout(formatter: Any) -> dict[str, Any]:
    layout: dict[str, Any] = {"prog": formatter._prog, "items": [], "arguments": {}}
    for function, values in formatter._root_section.items:
        if function == formatter._format_text:
            layout["items"].append(values[0])
        elif function != formatter._format_usage:
            layout["items"].append(_section(formatter, function.__self__, layout["arguments"]))
    return layout


def _section(formatter: Any, section: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    texts = [values[0] for function, values in section.items if function == formatter._format_text]
    actions = [values[0] for function, values in section.items if function == formatter._format_action]
    arguments |= {_name(action): _packaged_argument(formatter, action) for action in actions}
    return {"title": section.heading, "texts": texts, "arguments": [_name(action) for action in actions]}


def _packaged_argument(formatter: Any, action: argparse.Action) -> dict[str, Any]:
    kind = "optional" if action.option_strings else "positional"
    default = getattr(formatter, f"_get_default_metavar_for_{kind}")(action)
    own_heading = not action.option_strings and action.nargs == argparse.PARSER
    return {
        "name": action.dest,
        "flags": list(action.option_strings),
        "nargs": action.nargs,
        "metavar": formatter._metavar_formatter(action, default)(1)[0],
        "required": action.required,
        "help": formatter._expand_help(action),
        "heading": formatter._format_action_invocation(action) if own_heading else None,
        "inner": [_packaged_argument(formatter, inner) for inner in getattr(action, "_get_subactions", list)()],
    }


def _name(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else action.dest


def main() -> None:
    """Writes ``help_texts.json``."""
    commands = {command: record(command)[1] for command in ("", *COMMANDS)}
    shared: list[dict[str, Any]] = []  # most arguments are those of several commands
    for layout in commands.values():
        for name, argument in layout["arguments"].items():
            if argument not in shared:
                shared.append(argument)
            layout["arguments"][name] = shared.index(argument)
    packaged = {"made_from": made_from(), "commands": commands, "arguments": shared}
    text = json.dumps(packaged, indent=1, ensure_ascii=False)
    FILE.write_text(text + "\n", encoding="utf-8")
    print(f"{FILE.name}: {len(text) / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
