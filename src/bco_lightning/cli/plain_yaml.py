"""YAML from somebody else: measured before it is built, so that none takes long, swells, or names a Python object."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import yaml
from jsonargparse import get_loader

from bco_lightning.errors import ConfigError

LARGEST_TEXT = 1_000_000
LONGEST_PLAIN_SCALAR = 10_000
MOST_NODES = 10_000
DEEPEST_NESTING = 50

load_unmeasured = get_loader("yaml")


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


def load_measured(text: str, where: str) -> Any:
    """Reads YAML of a size that can be read, numbers as jsonargparse has them (``1e-6`` is one).

    Raises:
        Refusal: If it is too large, swells by aliases, or holds Python tags.
        yaml.YAMLError: If it is no YAML.
    """
    if len(text) > LARGEST_TEXT:
        raise Refusal(where, f"expected at most {LARGEST_TEXT:,} characters of YAML, found {len(text):,}.")
    _refuse_swelling(text, where)
    return load_unmeasured(text)


def _refuse_swelling(text: str, where: str) -> None:
    """Measures the document as it would be with its aliases written out, in one pass that builds nothing."""
    sizes: dict[str | None, int] = {}
    nodes = 0
    open_nodes: list[tuple[str | None, int]] = []  # an anchor, and how many nodes there were before it
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
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


def _refuse_tag_or_length(event: yaml.Event, where: str) -> None:
    if str(getattr(event, "tag", None) or "").startswith("tag:yaml.org,2002:python/"):
        raise Refusal(where, "expected plain YAML values, found a Python tag.", "Tags can run code; none is read.")
    # YAML's numbers in base 60 take time that grows with the square of their length.
    if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and len(event.value) > LONGEST_PLAIN_SCALAR:
        raise Refusal(where, f"expected at most {LONGEST_PLAIN_SCALAR:,} characters without quotes, found more.")
