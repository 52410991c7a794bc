"""The program that is run where a GPU is at hand runs on a CPU too, so that it works on the day."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_part_runs_and_its_numbers_are_right(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    subprocess.run([sys.executable, PROGRAM, "--tiny", "--output", output], check=True, timeout=900)
    found = json.loads(output.read_text())
    assert not {name: values for name, values in found.items() if "failed" in values}
    for name, values in found.items():
        if name.startswith("float32"):
            assert values["log_prob_rms"] < 5e-4
            assert values["gradient"] < 1e-4
        if name.startswith("first log-ratio"):
            assert values["same_batch"] == 0
        if name.startswith("fsdp2"):
            assert values["largest_difference_of_losses"] < 1e-3
        if name.startswith("resume"):
            assert values["same_to_the_bit"]
    # Where packing does not work, rows are padded, which is no failure but another measurement.
    ours = [values for name, values in found.items() if ": " in name and "TRL" not in name]
    assert all("are packed," in values["said"] for values in ours)
    assert not [name for name in found if "prepared" in name and "(packed)" not in name]
