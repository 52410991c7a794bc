"""Two processes under DDP give the numbers of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def launch(world_size: int, tiny_model: str, log: str, output: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world_size}", "--master_port=0"]
    command += ["--standalone", "-m", "tests.distributed.worker", tiny_model, log, str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(world_size)]


def test_weights_shift_and_metrics_do_not_depend_on_the_number_of_processes(
    tiny_model: str, log: str, tmp_path: Path
) -> None:
    (one,) = launch(1, tiny_model, log, tmp_path / "one")
    first, second = launch(2, tiny_model, log, tmp_path / "two")
    assert one["shift"] != 0
    assert any(name.startswith("val/") for name in one["values"])
    assert first["weights"] == second["weights"]
    for result in (first, second):
        assert result["shift"] == pytest.approx(one["shift"], rel=1e-4, abs=1e-7)
        assert result["weights"] == pytest.approx(one["weights"], abs=1e-4)
        assert result["values"].keys() == one["values"].keys()
        for name, value in one["values"].items():
            assert result["values"][name] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), name
