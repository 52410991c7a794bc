"""Secrets belong into the environment alone: configs and command lines end in saved configs and histories."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace

from bco_lightning.cli.plain_yaml import Refusal, load_measured, refusals_as_errors

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


def load_without_secrets(text: str, path: str = "") -> Any:
    """Reads a config file, or a value of the command line: YAML of a size that can be read, without secrets.

    Raises:
        Refusal: If it is too large, swells, holds Python tags or something that looks like a secret.
    """
    where = str(path) or "config"
    try:
        value = load_measured(text, where)
    except (yaml.YAMLError, ValueError):
        # What cannot be read ends in an error message, with its text.
        if _SECRET_VALUE.search(text):
            _refuse(where)
        raise
    _refuse_secrets_of(value, where)
    return value


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Refuses a command line that holds something that looks like a secret; says where, never what.

    Raises:
        ConfigError: Naming the option.
    """
    with refusals_as_errors():
        for option, text in options_in(arguments):
            where = "command line" if _SECRET_VALUE.search(option) else option
            try:
                value = load_measured(text, where)
            except (yaml.YAMLError, ValueError):
                value = text
            _refuse_secrets_of({where.lstrip("-"): value}, where)
            if _SECRET_VALUE.search(text) or _SECRET_VALUE.search(option):
                _refuse(where)


def options_in(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
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


def leaves_of(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Values at the ends of nested mappings and lists, with the keys that lead there."""
    value = vars(value) if isinstance(value, Namespace) else value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves_of(inner, (*path, str(key)))
    elif isinstance(value, (list, tuple, set)):
        for number, inner in enumerate(value):
            yield from leaves_of(inner, (*path, str(number)))
    else:
        yield path, value


def _refuse_secrets_of(value: Any, where: str) -> None:
    for path, leaf in leaves_of(value):
        name = ".".join(path)
        if _SECRET_VALUE.search(name):
            _refuse(where)
        is_set = leaf is not None and not isinstance(leaf, bool) and leaf != ""
        names_secret = is_set and any(_is_secret_name(part) for part in name.split("."))
        if names_secret or (isinstance(leaf, str) and _SECRET_VALUE.search(leaf)):
            _refuse(name or where)


def _refuse(where: str) -> NoReturn:
    raise Refusal(
        where,
        "expected no secret in a config file or on the command line, found what looks like one (not shown).",
        "Configs are saved with every run. Give it by the environment alone, for instance HF_TOKEN.",
    )


def _is_secret_name(name: str) -> bool:
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    pairs = list(zip(["", *words], words))  # noqa: B905
    return (
        bool(_SECRET_WORDS & set(words))
        or any(second == "key" and first in _SECRET_KEYS for first, second in pairs)
        or (words[-1:] == ["token"] and pairs[-1][0] not in _HARMLESS_TOKENS)
    )
