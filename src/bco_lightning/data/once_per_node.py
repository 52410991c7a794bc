"""Reading by one process of each node, for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bco_lightning.data.cache import values_in
from bco_lightning.data.row_sets import ReadRows
from bco_lightning.errors import FaultError, FeedbackRowError, UserError, causes_of
from bco_lightning.parallel.collectives import by_all, made_once_per_node


def read_once_per_node(read: Callable[[], None], rows: dict[str, ReadRows], trainer: Any) -> None:
    """Has the first process of this node read; the others wait for it, without a limit of time, and open its files.

    What one of them raises, all raise: as it is if a user can meet it, else as a ``RuntimeError`` that says the same.
    All raise too if the nodes have not read the same rows, or one process cannot see the files of its node.
    """
    raised: list[Exception] = []

    def outcome() -> dict[str, Any]:
        try:
            read()
            contents = {name: what for known in rows.values() for name, what in known.contents().items()}
            folders = {name: str(known.folder) for name, known in rows.items()}
            return {"node": trainer.node_rank, "folders": folders, "contents": contents}
        except Exception as error:
            raised.append(error)
            known = (cause for cause in causes_of(error) if isinstance(cause, (UserError, OSError, MemoryError)))
            return {"error": next(known, None) or RuntimeError(f"{type(error).__name__}: {error}")}

    outcomes = made_once_per_node(outcome, trainer)
    for error in [*raised, *(known["error"] for known in outcomes if "error" in known)]:
        raise error
    contents = {known["node"]: known["contents"] for known in outcomes}
    first = min(contents)
    for node, found in contents.items():
        names = [name for name in {**contents[first], **found} if found.get(name) != contents[first].get(name)]
        if names:
            raise FeedbackRowError(
                f"node {node}",
                f"expected the rows that node {first} has read, found others ({', '.join(names)}).",
                "Give all nodes the same files, tokenizer and chat template.",
            )

    def open_files() -> None:
        folders = next(known["folders"] for known in outcomes if known["node"] == trainer.node_rank)
        rows.update({name: _opened(Path(folders[name])) for name in folders if name not in rows})

    by_all(open_files if trainer.local_rank > 0 else lambda: None, trainer)


def _opened(folder: Path) -> ReadRows:
    try:
        return ReadRows.opened(folder, values_in(folder))
    except (OSError, ValueError) as error:
        raise FaultError(
            "processes",
            f"expected those of a node to see each other's files, found that this one cannot see {folder}, which the "
            "first one has written.",
            "Start the processes of a node in one container, or each as a node of its own.",
        ) from error
