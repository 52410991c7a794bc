"""The rivals' virtual environments: one each, so that no version of ours has to give way."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent / ".venvs"
# trl 1.13.0 is the last with BCOTrainer; its BCO imports scikit-learn and joblib.
PACKAGES = {"trl_bco": ["trl==1.13.0", "scikit-learn", "joblib"], "trl_kto": ["trl>=1.16"]}
SHARED = ["torch", "transformers", "peft"]


def python_of(rival: str) -> str:
    """The interpreter of a rival's environment.

    Raises:
        SystemExit: If the environment was not made yet.
    """
    if rival == "unwatched":
        return sys.executable
    python = FOLDER / rival / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        raise SystemExit(f"There is no environment for {rival} yet. Run: python benchmarks/speed.py setup")
    return str(python)


def create(rivals: list[str]) -> None:
    """Creates environments with the versions of torch, transformers and peft that ours runs with.

    Args:
        rivals: Names in ``PACKAGES``.
    """
    for rival in rivals:
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER / rival)], check=True)
        # torch goes first and keeps its version, so that pip never takes another build for TRL's sake.
        pins = [f"{name}=={version(name).partition('+')[0]}" for name in SHARED]
        for packages in (pins[:1], [*pins, *PACKAGES[rival]]):
            subprocess.run([python_of(rival), "-m", "pip", "install", *packages], check=True)
