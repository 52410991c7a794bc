"""Help that was printed once is kept in the cache folder: the next time it comes before PyTorch is imported."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from bco_lightning.places import cache_root

COMMANDS = ("fit", "validate", "test", "predict", "inspect", "report", "export", "chat", "plan", "completion")


def kept_help(arguments: Sequence[str]) -> str | None:
    """What this command line printed before, if it asks for help alone and nothing has changed since."""
    place = _place_of(arguments)
    with contextlib.suppress(OSError, UnicodeError):
        made_from, _, text = place.read_text(encoding="utf-8").partition("\n") if place else ("", "", "")
        return text if made_from == _made_from() else None
    return None


@contextlib.contextmanager
def keeping_help(arguments: Sequence[str]) -> Iterator[None]:
    """Keeps what is printed within it for :func:`kept_help`, if the command line asks for help alone."""
    place, printed = _place_of(arguments), io.StringIO()
    if place is None:
        yield
        return
    try:
        with contextlib.redirect_stdout(printed):
            yield
    except SystemExit as done:
        sys.stdout.write(printed.getvalue())
        if not done.code:  # a signal cuts help off
            with contextlib.suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(f"{_made_from()}\n{printed.getvalue()}", encoding="utf-8")
        raise


def _place_of(arguments: Sequence[str]) -> Path | None:
    """A file for each command and width of the terminal; none for a command line that asks for anything else."""
    *command, last = arguments or [""]
    if last not in ("--help", "-h") or command not in ([], *([name] for name in COMMANDS)):
        return None
    return cache_root() / "help" / f"{''.join(command) or 'all'}-{shutil.get_terminal_size().columns}.txt"


def _made_from() -> str:
    """A digest of the versions of what writes help, and of the state of our own files."""
    files = sorted((str(path), path.stat().st_mtime_ns) for path in Path(__file__).parents[1].rglob("*.py"))
    versions = [sys.version, *map(version, ("lightning", "jsonargparse"))]
    return hashlib.sha256(repr((versions, files)).encode()).hexdigest()
