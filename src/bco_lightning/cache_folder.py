"""Where what can be computed again is kept."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER_VARIABLE = "BCO_CACHE"


def cache_root(given: str | None) -> Path:
    """The folder of all caches: the one given, that of ``BCO_CACHE``, or the user's own for such things."""
    named = given or os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bco_lightning"
