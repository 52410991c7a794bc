"""Reading by one process of each node, for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bco_lightning.errors import FeedbackRowError, UserError, causes_of
from bco_lightning.parallel.collectives import made_once_per_node


def read_once_per_node(read: Callable[[], dict[str, Any]], trainer: Any) -> dict[str, Any]:
    """What the first process of this node has read; the others wait for it, without a limit of time.

    Args:
        read: Gives plain values of each read, of which ``contents`` have to be the same on every node.
        trainer: The Lightning trainer, with several processes.

    Raises:
        UserError: In every process, what one of those that read met. An exception that is neither this nor one of disk
            or memory leaves the others with a ``RuntimeError`` that says the same.
        FeedbackRowError: In every process, if the nodes have not read the same rows.
    """
    raised: list[Exception] = []

    def outcome() -> dict[str, Any]:
        try:
            return {"node": trainer.node_rank, "read": read()}
        except Exception as error:
            raised.append(error)
            known = (cause for cause in causes_of(error) if isinstance(cause, (UserError, OSError, MemoryError)))
            return {"error": next(known, None) or RuntimeError(f"{type(error).__name__}: {error}")}

    outcomes = made_once_per_node(outcome, trainer)
    if raised:
        raise raised[0]
    for known in outcomes:
        if "error" in known:
            raise known["error"]
    read_by = {known["node"]: known["read"] for known in outcomes}
    _require_same_rows({node: _contents(found) for node, found in read_by.items()})
    return read_by[trainer.node_rank]  # type: ignore[no-any-return]


def _contents(found: dict[str, Any]) -> dict[str, Any]:
    return {name: content for read in found.values() for name, content in read["contents"].items()}


def _require_same_rows(contents: dict[int, dict[str, Any]]) -> None:
    first = min(contents)
    for node, content in contents.items():
        names = [name for name in {**contents[first], **content} if content.get(name) != contents[first].get(name)]
        if names:
            raise FeedbackRowError(
                f"node {node}",
                f"expected the rows that node {first} has read, found others ({', '.join(names)}).",
                "Give all nodes the same files, tokenizer and chat template.",
            )
