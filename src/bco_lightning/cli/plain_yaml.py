"""Texts from somebody else: YAML is measured before it is built, and what looks like a secret is refused."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, get_loader

from bco_lightning.errors import ConfigError

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
    # Of Stripe, Databricks, npm, PyPI, Docker, Slack, Google, SendGrid, Weights & Biases, DigitalOcean and Vault.
    r"|\b[srp]k_(?:live|test)_[A-Za-z0-9]{10,}|\bwhsec_\w{16,}|\bdapi[0-9a-f]{32}|\bnpm_[A-Za-z0-9]{30,}"
    r"|\bpypi-[\w-]{16,}|\bdckr_[a-z]{3}_[\w-]{16,}|\bxapp-[\w-]{10,}|hooks\.slack\.com/\w+/\w+|\bya29\.[\w-]{16,}"
    r"|\bGOCSPX-[\w-]{16,}|\bSG\.[\w-]{16,}\.[\w-]{16,}|\bwandb_v1_\w{16,}|\bdo[opr]_v1_[0-9a-f]{32,}|\bhvs\.[\w-]{16,}"
    r"|\bAIza[\w-]{30,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.|-----BEGIN [A-Z ]*PRIVATE KEY"
    # A user name alone may be a token; before an account of Azure it is the name of a container.
    r"|://(?<!\b(?i:az)://)(?<!\b(?i:abfs)://)(?<!\b(?i:abfss)://)[^\s/@]+@|://[^\s/@:]*:[^\s/@]*@"
    r"|[?&](?i:(?:[\w-]*[_-])?(?:sig|api_?key|access_?key|signature|token|secret|password|passwd|pwd|credential|credentials|auth|jwt|apikey|key))=[^\s&]"
)

load_unmeasured = get_loader("yaml")
_EVENTS = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Refusal(BaseException):
    """A :class:`ConfigError` on its way through jsonargparse, which would take any other exception for a wrong type."""

    def __init__(self, where: str, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.user_error = ConfigError(where, problem, remedy)


@contextlib.contextmanager
def refusals_as_errors() -> Iterator[None]:
    """Ends the way of a refusal, which comes out as the ConfigError that it is."""
    try:
        yield
    except Refusal as refusal:
        raise refusal.user_error from None


# --- size


def load_measured(text: str, where: str) -> Any:
    """Reads YAML, numbers as jsonargparse has them (``1e-6`` is one), if it is not too large, swelling, or a program.

    The document is measured as it would be with its aliases written out, in one pass that builds nothing.
    """
    if len(text) > LARGEST_TEXT:
        raise Refusal(where, f"expected at most {LARGEST_TEXT:,} characters of YAML, found {len(text):,}.")
    sizes: dict[str | None, int] = {}
    nodes = 0
    open_nodes: list[tuple[str | None, int]] = []  # an anchor, and how many nodes there were before it
    for event in yaml.parse(text, Loader=_EVENTS):
        _refuse_tag_or_length(event, where)
        if isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in open_nodes):
                raise Refusal(where, "expected YAML that ends, found an alias that holds itself.")
            nodes += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes[anchor] = nodes - before
        elif isinstance(event, yaml.NodeEvent):
            sizes[event.anchor] = 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, nodes))
            nodes += 1
        if nodes > MOST_NODES:
            raise Refusal(where, f"expected at most {MOST_NODES:,} YAML nodes with aliases written out, found more.")
        if len(open_nodes) > DEEPEST_NESTING:
            raise Refusal(where, f"expected at most {DEEPEST_NESTING} levels of YAML, found more.")
    return load_unmeasured(text)


def _refuse_tag_or_length(event: yaml.Event, where: str) -> None:
    if str(getattr(event, "tag", None) or "").startswith("tag:yaml.org,2002:python/"):
        raise Refusal(where, "expected plain YAML values, found a Python tag.", "Tags can run code; none is read.")
    # YAML's numbers in base 60 take time that grows with the square of their length.
    if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and len(event.value) > LONGEST_PLAIN_SCALAR:
        raise Refusal(where, f"expected at most {LONGEST_PLAIN_SCALAR:,} characters without quotes, found more.")


# --- secrets


def load_without_secrets(text: str, path: str = "") -> Any:
    """Reads a config file, or a value of the command line; where it is refused, by a :class:`Refusal`."""
    where = str(path) or "config"
    try:
        value = load_measured(text, where)
    except (yaml.YAMLError, ValueError) as error:
        # What cannot be read ends in an error message, with its text.
        if _SECRET_VALUE.search(text):
            _refuse(where)
        if path and isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            place = f"{where}:{error.problem_mark.line + 1}"
            raise Refusal(place, f"expected YAML, found a mistake: {error.problem}.") from None
        raise
    _refuse_secrets_of(value, where)
    _refuse_keys_twice(yaml.compose(text, Loader=_EVENTS), where)
    return value


def _refuse_keys_twice(node: Any, where: str) -> None:
    """Refuses a mapping that gives a key two values, of which YAML would take the last without a word."""
    lines: dict[Any, int] = {}
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, *values = child if isinstance(child, tuple) else (None, child)
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                found = f"expected each key once, found {key.value!r} here and in line {lines[key.value]}."
                raise Refusal(f"{where}:{line}", found, "Only the last one would count.")
            lines[key.value] = line
        for value in values:
            _refuse_keys_twice(value, where)


def refuse_secrets(arguments: Sequence[str]) -> None:
    """Refuses a command line that holds something that looks like a secret; says where, never what."""
    with refusals_as_errors():
        for option, text in options_in(arguments):
            where = "command line" if _SECRET_VALUE.search(option) else option
            value: Any = text
            with contextlib.suppress(yaml.YAMLError, ValueError):
                value = load_measured(text, where)
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
            yield option, value
        else:
            yield option, argument


def leaves_of(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Values at the ends of nested mappings and lists, with the keys that lead there."""
    value = vars(value) if isinstance(value, Namespace) else value
    if isinstance(value, (list, tuple, set)):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves_of(inner, (*path, str(key)))
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
    problem = "expected no secret in a config file or on the command line, found what looks like one (not shown)."
    remedy = "Configs are saved with every run. Give it by the environment alone, for instance HF_TOKEN."
    raise Refusal(where, problem, remedy)


def _is_secret_name(name: str) -> bool:
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]
    pairs = list(zip(["", *words], words))  # noqa: B905
    return (
        bool(_SECRET_WORDS & set(words))
        or any(second == "key" and first in _SECRET_KEYS for first, second in pairs)
        or (words[-1:] == ["token"] and pairs[-1][0] not in _HARMLESS_TOKENS)
    )
