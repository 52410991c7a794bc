"""What an export tells of its objective, beside the model's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from bco_lightning.objectives.named import make_objective
from bco_lightning.objectives.objective import Objective

ALIGNMENT_FILE = "bco.json"


def write_alignment(folder: Path, trained: Objective, **told: Any) -> None:
    """Writes the plain numbers of an objective, and what else is told: its name, ``beta`` and ``reference``."""
    values = {"reward_shift": trained.reward_shift.state_dict(), "baselines": trained.state_dict(), **told}
    (folder / ALIGNMENT_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def exported_objective(folder: Path, decay: float, **ours: Any) -> Objective | None:
    """The objective that an exported model was trained with; where ``ours`` is told otherwise, that is said."""
    file = folder / ALIGNMENT_FILE
    if not file.exists():
        return None
    told = json.loads(file.read_text(encoding="utf-8"))
    for key, value in ours.items():
        if told[key] != value:
            rank_zero_info(f"{file}: aligned with {key} {told[key]}, evaluated with {value}.")
    objective = make_objective(told["objective"], decay, place=str(file))
    objective.reward_shift.load_state_dict(told["reward_shift"])
    objective.load_state_dict(told.get("baselines", {}))
    return objective
