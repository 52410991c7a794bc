"""Memory and time of a stream as its rows grow to ten million: the pass over its files, the first batch, the steps."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import machine
from rows import MODEL

RESULTS = Path(__file__).parent / "results" / "streaming.json"
ROWS = (100_000, 1_000_000, 10_000_000)
NUM_FILES, CHUNK = 20, 10_000
ROWS_PER_STEP, STEPS, SHUFFLE_BUFFER = 64, 100, 10_000
TEXT = "the quick brown fox jumps over a lazy dog and writes some code about models tokens rows and steps"


def write_files(folder: Path, num_rows: int) -> str:
    """Writes rows of about 120 bytes, two thirds of them thumbs-up, and gives a glob of the files."""
    words = TEXT.split()
    texts = [" ".join(words[(start + place) % len(words)] for place in range(7)) for start in range(len(words))]
    for number in range(NUM_FILES):
        with (folder / f"rows-{number:02}.jsonl").open("w", encoding="utf-8") as file:
            first, stop = (num_rows * n // NUM_FILES for n in (number, number + 1))
            for start in range(first, stop, CHUNK):
                file.writelines(
                    f'{{"prompt": "{row} {texts[row % len(texts)]}?", "completion": "{texts[row * 7 % len(texts)]}.", '
                    f'"label": {"true" if row % 3 else "false"}}}\n'
                    for row in range(start, min(start + CHUNK, stop))
                )
    return str(folder / "rows-*.jsonl")


def measure(files: str) -> dict[str, Any]:
    """Reads and loads in this process.

    Args:
        files: A glob.

    Returns:
        Seconds, and by how many MiB anonymous memory peaked in them.
    """
    from bco_lightning.models.load import load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    with tempfile.TemporaryDirectory() as name, Peak():  # what the first use loads is no matter of the number of rows
        _load(_read(write_files(Path(name), 2000), tokenizer), 1)
    started = time.perf_counter()
    with Peak() as peak:
        module = _read(files, tokenizer)
        read = time.perf_counter() - started
        first = _load(module, 1)
        steps = _load(module, STEPS)
    [counts] = module.counts
    return {
        "rows": counts.used,
        "thumbs_up": module.class_frequencies[0],
        "pass_seconds": read,
        "rows_per_second_of_pass": counts.used / read,
        "first_batch_seconds": first,
        "rows_per_second_of_loading": STEPS * ROWS_PER_STEP / steps,
        **peak.found,
    }


def _read(files: str, tokenizer: Any) -> Any:
    from bco_lightning import FeedbackDataModule

    options = {"batch_size": ROWS_PER_STEP, "shuffle_buffer": SHUFFLE_BUFFER, "streaming": True, "cache_rows": False}
    module = FeedbackDataModule(files, tokenizer=tokenizer, **options)
    module.setup("fit")
    return module


def _load(module: Any, steps: int) -> float:
    """Seconds of a loader's first steps, from nothing."""
    started = time.perf_counter()
    batches = iter(module.train_dataloader())
    for _ in range(steps):
        next(batches)
    return time.perf_counter() - started


class Peak:
    """By how much anonymous memory peaks, looked at every hundredth of a second."""

    def __enter__(self) -> Peak:
        self._before, self._most = _anonymous(), 0.0
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self._most = max(self._most, _anonymous())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()
        self.found = {"mib": self._most - self._before}


def _anonymous() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def in_a_process(files: str) -> dict[str, Any]:
    """Measures in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--point", files],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(points: list[dict[str, Any]]) -> Table:
    """All figures, a row for each number of rows."""
    made = Table("rows", "seconds", "rows/s", "first batch, s", "loading, rows/s", "MiB")
    for point in points:
        made.add_row(
            f"{point['rows']:,}",
            f"{point['pass_seconds']:.1f}",
            f"{point['rows_per_second_of_pass']:,.0f}",
            f"{point['first_batch_seconds']:.3f}",
            f"{point['rows_per_second_of_loading']:,.0f}",
            f"{point['mib']:.0f}",
        )
    return made


def main() -> None:
    """Measures every number of rows, prints a table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="numbers of rows")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(options.point)))
        return
    points = []
    for num_rows in options.rows:
        with tempfile.TemporaryDirectory() as name:
            files = write_files(Path(name), num_rows)
            points.append(in_a_process(files))
    Console().print(table(points))
    settings = {"rows_per_step": ROWS_PER_STEP, "steps": STEPS, "shuffle_buffer": SHUFFLE_BUFFER}
    told = {"machine": machine.describe(), "settings": settings, "points": points}
    RESULTS.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
