"""How fast does a feedback log become micro-batches, and what does it take of memory and disk?

    python benchmarks/speed.py setup --rivals trl_bco      # once
    python benchmarks/reading.py                           # 10,000 and 100,000 rows, ours and TRL 1.13 in turns

Both sides read the same JSON lines and apply the same chat template; each run is a process of its own, and the clock
starts after imports and the tokenizer. `again` is a second start of ours, which finds the rows tokenized; `streaming`
reads each once before the first step, keeps its place, and tokenizes it when a step needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import environments
import rows as benchmark_rows
import speed

HERE = Path(__file__).parent
STREAMING = {"streaming": True}
DEMAND = "at least 4 times the rows per second of TRL 1.13, and memory that does not grow with rows"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints a table and writes benchmarks/results/reading.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="numbers of rows")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side that count (default: 3)")
    parser.add_argument("--without-rival", action="store_true", help="measure ours alone")
    options = parser.parse_args(arguments)
    report = speed.started()
    report["demand"] = DEMAND
    report["runs"] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in options.rows:
            log = _log(Path(folder) / f"{count}.jsonl", count)
            report["runs"][str(count)] = _measured(log, options.rounds, options.without_rival)
            Console().print(_table(count, report["runs"][str(count)]))
    speed.write("reading", report)


def _log(path: Path, count: int) -> Path:
    """Rows in chat form: a few thousand different ones, told apart by a number, since making text is slow."""
    tokenizer = _tokenizer()
    made = benchmark_rows.synthetic_rows(tokenizer, min(count, 5000), 1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = made[number % len(made)]
            prompt = [{"role": "user", "content": f"{number}. {row['prompt']}"}]
            completion = [{"role": "assistant", "content": f"{number}: {row['completion'].strip()}"}]
            file.write(json.dumps({"prompt": prompt, "completion": completion, "label": row["label"]}) + "\n")
    return path


def _tokenizer() -> Any:
    from bco_lightning.models.load import load_tokenizer

    return load_tokenizer(benchmark_rows.MODEL)


def _measured(log: Path, rounds: int, without_rival: bool) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            kept = {"cache_folder": folder}
            for name, run in {
                "first start": lambda: _run(sys.executable, "read_ours", log, kept),  # noqa: B023 - called at once
                "again": lambda: _run(sys.executable, "read_ours", log, kept),  # noqa: B023
                "streaming": lambda: _run(sys.executable, "read_ours", log, STREAMING),
                "TRL 1.13": lambda: _run(environments.python_of("trl_bco"), "read_theirs", log, {}),
            }.items():
                if not (without_rival and name == "TRL 1.13"):
                    found.setdefault(name, []).append(run())
    return found


def _run(python: str, worker: str, log: Path, options: dict[str, Any]) -> dict[str, float]:
    task = {"rows": str(log), "model": str(benchmark_rows.model_folder()), "options": options}
    done = subprocess.run(
        [python, "-m", f"workers.{worker}", json.dumps(task)],
        cwd=HERE,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{worker} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _table(count: int, runs: dict[str, list[dict[str, float]]]) -> Table:
    table = Table(
        "", "seconds", "rows/s", "against TRL", "first batch after, s", "written, MiB", "anonymous memory, MiB",
        title=f"{count:,} rows; medians of {len(next(iter(runs.values())))}",
    )  # fmt: skip
    middle = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    for name, run in middle.items():
        ratio = middle["TRL 1.13"]["read_s"] / run["read_s"] if "TRL 1.13" in middle else float("nan")
        table.add_row(
            name, f"{run['read_s']:.2f}", f"{count / run['read_s']:,.0f}", f"{ratio:.1f}",
            f"{run['first_batch_s']:.2f}", f"{run['written_mib']:.0f}", f"{run['anonymous_mib']:.0f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
