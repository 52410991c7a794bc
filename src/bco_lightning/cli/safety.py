"""What a config file may not do: import code, swell, carry secrets, or write outside the working directory.

A config may come from somebody else. Command line and environment are the user's own and may name what a config file
may not. Secrets belong into the environment alone: configs and command lines end in saved configs and histories.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings

from bco_lightning.errors import ConfigError

ALLOWED_IMPORTS_VARIABLE = "BCO_ALLOWED_IMPORTS"
ALLOWED_IMPORTS = (
    "bco_lightning.callbacks",
    # jsonargparse looks up optional dataclasses too, by their shortest path and by their own.
    "bco_lightning.LoraSettings",
    "bco_lightning.PromptFeatures",
    "bco_lightning.Rating",
    "bco_lightning.Source",
    "bco_lightning.data.Columns",
    "bco_lightning.data.Rating",
    "bco_lightning.data.Source",
    "bco_lightning.data.options",
    "bco_lightning.options.PromptFeatures",
    "bco_lightning.options.LoraSettings",
    "bco_lightning.parallel.strategy",
    "lightning.pytorch.accelerators",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "lightning.fabric.plugins",  # where cluster environments and checkpoint plugins of lightning.pytorch are defined
)

LARGEST_TEXT = 1_000_000
LONGEST_PLAIN_SCALAR = 10_000
MOST_NODES = 10_000
DEEPEST_NESTING = 50

_SECRET_WORDS = {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "apikey"}
_SECRET_KEYS = {"api", "access", "private", "secret", "auth", "account", "encryption", "signing", "license"}
_HARMLESS_TOKENS = {"eos", "bos", "pad", "unk", "sep", "cls", "mask", "end", "start", "max", "min", "num", "per"}
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-(?:[A-Za-z0-9]+-)*[A-Za-z0-9_]{16,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bgh[opsur]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}|\bxox[abeprs]-[\w-]{10,}"
    r"|\bAIza[\w-]{30,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.|-----BEGIN [A-Z ]*PRIVATE KEY"
    # A user name alone may be a token; before an account of Azure it is the name of a container.
    r"|://(?<!\b(?i:az)://)(?<!\b(?i:abfs)://)(?<!\b(?i:abfss)://)[^\s/@]+@|://[^\s/@:]*:[^\s/@]*@"
    r"|[?&](?i:sig|signature|token|access_token|x-amz-signature|x-amz-security-token|x-goog-signature)=[^\s&]"
)
_MAY_NAME_CLASSES = ("strategy", "accelerator", "profiler")
_READ_FROM = ("config", "ckpt_path", "data", "model")
_WRITTEN_TO = {("model", "cache_folder"), ("data", "cache_folder")}
_FROM_USER_ALONE = {("data", "cache_folder")}
_WEB_ADDRESS = re.compile(r"(?i:\s*https?:)")
_STRUCTURE = re.compile(r"(?:^|(?<=\.))(?:init_args|dict_kwargs|\d+)(?:\.|$)")

Chosen = list[tuple[str, set[str]]]

_load_plain_yaml = get_loader("yaml")
_granted_before: set[str] = set()


class Refusal(BaseException):
    """A :class:`ConfigError` on its way through jsonargparse, which would take any other exception for a wrong type."""

    def __init__(self, where: str, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.user_error = ConfigError(where, problem, remedy)


@contextlib.contextmanager
def safe_parsing() -> Iterator[None]:
    """Within it jsonargparse imports what is allowed alone, and every YAML text goes through :func:`load_yaml`.

    Raises:
        ConfigError: If something is refused.
    """
    try:
        with refusals_as_errors():
            _restrict_imports()
            set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
            yield
    finally:
        set_loader("yaml", _load_unmeasured, exceptions=(yaml.YAMLError,))


@contextlib.contextmanager
def refusals_as_errors() -> Iterator[None]:
    """Ends the way of a refusal, which comes out as the ConfigError that it is."""
    try:
        yield
    except Refusal as refusal:
        raise refusal.user_error from None


# --- imports


def allowed_imports() -> tuple[str, ...]:
    """Import paths that a config may name, those of ``BCO_ALLOWED_IMPORTS`` included."""
    return (*ALLOWED_IMPORTS, *_granted_by_environment())


def refuse_import_named_in(message: str) -> None:
    """Turns jsonargparse's message about an import that is not allowed into one that says what is.

    Args:
        message: What jsonargparse has to say about a value.

    Raises:
        Refusal: If the message is about such an import.
    """
    refused = re.search(r"Importing '([^']+)' is not allowed", message)
    if refused:
        key = re.search(r'(?:Parser key "|^--)([^":]+)', message)
        _refuse_import(key[1] if key else "config", refused[1])


def _refuse_import(where: str, name: str) -> NoReturn:
    raise Refusal(
        where,
        f"expected a class of {', '.join(allowed_imports())}; found {name}, which was not imported.",
        f"To allow a package of your own, name it in the environment: {ALLOWED_IMPORTS_VARIABLE}=my_package",
    )


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


# --- YAML


def load_yaml(text: str, path: str = "") -> Any:
    """Reads a config file, or a value of the command line, after it was found to be of a size that can be read.

    Args:
        text: YAML.
        path: Name of the file, for messages.

    Returns:
        Plain values, numbers as jsonargparse reads them (``1e-6`` is one).

    Raises:
        Refusal: If it is too large, swells, holds Python tags or something that looks like a secret.
    """
    where = str(path) or "config"
    try:
        value = _load_measured(text, where)
    except (yaml.YAMLError, ValueError):
        # What cannot be read ends in an error message, with its text.
        if _SECRET_VALUE.search(text):
            _refuse_secret(where)
        raise
    _refuse_secrets_of(value, where)
    return value


def _load_unmeasured(text: str, path: str = "") -> Any:
    """The loader of jsonargparse, for other parsers of this process; a path is handed over ever since one took it."""
    return _load_plain_yaml(text)


def _load_measured(text: str, where: str) -> Any:
    _refuse_swelling(text, where)
    return _load_plain_yaml(text)


def _refuse_swelling(text: str, where: str) -> None:
    """Measures the document as it would be with its aliases written out, in one pass that builds nothing."""
    if len(text) > LARGEST_TEXT:
        raise Refusal(where, f"expected at most {LARGEST_TEXT:,} characters of YAML, found {len(text):,}.")
    size_of_anchor: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        _refuse_tag_or_length(event, where)
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            _refuse_dimensions(1, len(open_nodes) - 1, where)
            continue
        anchor, size = None, 0
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            size = _size_of_alias(event.anchor, size_of_anchor, open_nodes, where)
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        if anchor is not None:
            size_of_anchor[anchor] = size
        outer, outer_size = open_nodes[-1]
        open_nodes[-1] = (outer, outer_size + size)
        _refuse_dimensions(outer_size + size, len(open_nodes) - 1, where)


def _size_of_alias(
    anchor: str | None, sizes: dict[str, int], open_nodes: list[tuple[str | None, int]], where: str
) -> int:
    if any(anchor == name for name, _ in open_nodes):
        raise Refusal(where, "expected YAML that ends, found an alias that holds itself.")
    return sizes.get(str(anchor), 1)


def _refuse_dimensions(nodes: int, depth: int, where: str) -> None:
    if nodes > MOST_NODES:
        raise Refusal(where, f"expected at most {MOST_NODES:,} YAML nodes with aliases written out, found more.")
    if depth > DEEPEST_NESTING:
        raise Refusal(where, f"expected at most {DEEPEST_NESTING} levels of YAML, found more.")


def _refuse_tag_or_length(event: yaml.Event, where: str) -> None:
    if str(getattr(event, "tag", None) or "").startswith("tag:yaml.org,2002:python/"):
        raise Refusal(where, "expected plain YAML values, found a Python tag.", "Tags can run code; none is read.")
    # YAML's numbers in base 60 take time that grows with the square of their length.
    if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and len(event.value) > LONGEST_PLAIN_SCALAR:
        raise Refusal(where, f"expected at most {LONGEST_PLAIN_SCALAR:,} characters without quotes, found more.")


# --- secrets


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Refuses a command line that holds something that looks like a secret; says where, never what.

    Args:
        arguments: The command line.

    Raises:
        ConfigError: Naming the option.
    """
    with refusals_as_errors():
        for option, text in _options(arguments):
            _refuse_secret_option(option, text)


def _refuse_secret_option(option: str, text: str) -> None:
    where = "command line" if _SECRET_VALUE.search(option) else option
    try:
        value = _load_measured(text, where)
    except (yaml.YAMLError, ValueError):
        value = text
    _refuse_secrets_of({where.lstrip("-"): value}, where)
    if _SECRET_VALUE.search(text) or _SECRET_VALUE.search(option):
        _refuse_secret(where)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option with each of its values; what stands before the first option belongs to the command line."""
    option = "command line"
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("-") and (equals or not re.match(r"-[\d.]", argument)):
            option = name
            if not equals:
                yield option, ""
                continue
        yield option, value if option == name else argument


def _refuse_secrets_of(value: Any, where: str) -> None:
    for path, leaf in _leaves(value):
        name = ".".join(path)
        if _SECRET_VALUE.search(name):
            _refuse_secret(where)
        named_secret = leaf is not None and not isinstance(leaf, bool) and leaf != "" and _names_secret(path)
        if named_secret or (isinstance(leaf, str) and _SECRET_VALUE.search(leaf)):
            _refuse_secret(name or where)


def _refuse_secret(where: str) -> NoReturn:
    raise Refusal(
        where,
        "expected no secret in a config file or on the command line, found what looks like one (not shown).",
        "Configs are saved with every run. Give it by the environment alone, for instance HF_TOKEN.",
    )


def _names_secret(path: Sequence[str]) -> bool:
    return any(_is_secret_name(part) for key in path for part in key.split("."))


def _is_secret_name(name: str) -> bool:
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    pairs = list(zip(["", *words], words))  # noqa: B905
    return (
        bool(_SECRET_WORDS & set(words))
        or any(second == "key" and first in _SECRET_KEYS for first, second in pairs)
        or (words[-1:] == ["token"] and pairs[-1][0] not in _HARMLESS_TOKENS)
    )


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Values at the ends of nested mappings and lists, with the keys that lead there."""
    value = vars(value) if isinstance(value, Namespace) else value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(value, (list, tuple, set)):
        for number, inner in enumerate(value):
            yield from _leaves(inner, (*path, str(number)))
    else:
        yield path, value


# --- values of the resolved config


def check_resolved(options: Namespace, arguments: Sequence[str]) -> None:
    """Refuses what only the user may name: places outside the working directory, web addresses, and other classes.

    Args:
        options: The resolved options of a command.
        arguments: The command line; a place or an address that it names itself is the user's own choice.

    Raises:
        ConfigError: Naming the option.
    """
    trainer = options.get("trainer") or {}
    with refusals_as_errors():
        for name in _MAY_NAME_CLASSES:
            if re.fullmatch(r"\w+(\.\w+)+", str(trainer.get(name))):
                _refuse_import(f"trainer.{name}", str(trainer.get(name)))
        chosen = _chosen_by_user(arguments)
        _refuse_places_outside(options, chosen)
        _refuse_web_addresses(options, chosen)


def _refuse_places_outside(options: Namespace, chosen: Chosen) -> None:
    for path, leaf in _leaves(options):
        read_only = path[0] in _READ_FROM and path not in _WRITTEN_TO
        if read_only or path[-1] in ("class_path", "__path__") or not isinstance(leaf, (str, os.PathLike)):
            continue
        option, text = _STRUCTURE.sub("", ".".join(path)).rstrip("."), str(leaf)
        by_user = _is_by_user(option, text, chosen)
        if not by_user and path in _FROM_USER_ALONE:
            raise Refusal(
                option,
                f"expected it on the command line alone, found {text!r} in a config file.",
                "What lies there is taken for rows of the log; whoever wrote the config could have put it there.",
            )
        if not by_user and _leads_out(text, Path.cwd().resolve()):
            raise Refusal(
                option,
                f"expected a place inside the working directory, found {text!r}.",
                f"A config file may not name places outside it; give this one on the command line: --{option}={text}",
            )


def _refuse_web_addresses(options: Namespace, chosen: Chosen) -> None:
    """Refuses data files on web servers: the machine may reach some that the config's author does not."""
    for path, leaf in _leaves(options):
        if path[0] != "data" or path[-1] == "name" or not isinstance(leaf, str) or not _WEB_ADDRESS.match(leaf):
            continue
        option = _STRUCTURE.sub("", ".".join(path[:2]))
        if not _is_by_user(option, leaf, chosen):
            raise Refusal(
                option,
                "expected files of this machine or of a storage service, found a web address.",
                f"A config file may not name web addresses; give this one on the command line: --{option}=ADDRESS",
            )


def _is_by_user(option: str, text: str, chosen: Chosen) -> bool:
    return any(text in texts and f"{option}.".startswith(f"{name}.") for name, texts in chosen)


def _chosen_by_user(arguments: Sequence[str]) -> Chosen:
    """Options of the command line, without what only structures them, and the texts that stand in their values."""
    chosen = []
    for option, text in _options(arguments):
        with contextlib.suppress(yaml.YAMLError, ValueError):
            texts = {text, *(str(leaf) for _, leaf in _leaves(_load_measured(text, option)))}
            chosen.append((_STRUCTURE.sub("", option.lstrip("-").rstrip("+")).rstrip("."), texts))
    return chosen


def _leads_out(text: str, root: Path) -> bool:
    """Whether a path would leave ``root``: absolute, by ``..``, by a link, a URL, or a variable that loggers expand."""
    if "://" in text or "$" in text or text.startswith("~"):
        return True
    try:
        return not (root / text).resolve().is_relative_to(root)
    except (OSError, ValueError, RuntimeError):  # no path at all, or links in a circle
        return True
