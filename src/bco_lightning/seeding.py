"""One seed for everything that is not given its own."""

from __future__ import annotations

import os


def chosen_seed(seed: int | None) -> int:
    """The seed given, else that of Lightning's ``seed_everything``, else 0."""
    return seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))
