"""The command line; importing this package loads no PyTorch, so that help which is known comes at once."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command: see :func:`bco_lightning.cli.app.main`."""
    from bco_lightning.cli import app

    return app.main(arguments)
