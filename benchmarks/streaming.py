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
MODES = ("first pass", "sample")
NUM_FILES, CHUNK = 20, 10_000
ROWS_PER_STEP, STEPS, SHUFFLE_BUFFER, SAMPLE = 64, 100, 10_000, 10_000
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


def measure(files: str, mode: str) -> dict[str, Any]:
    """Reads and loads in this process.

    Args:
        files: A glob.
        mode: Whether all rows or a sample of them are read in advance.

    Returns:
        Seconds, and by how many MiB anonymous memory peaked in them, here and with all processes of the pass.
    """
    from bco_lightning.data.reading import ReadingOptions
    from bco_lightning.data.source import Source
    from bco_lightning.data.streaming import StreamedRows
    from bco_lightning.models.load import load_tokenizer

    tokenizer, options = load_tokenizer(MODEL), ReadingOptions()
    sample = SAMPLE if mode == "sample" else None
    with tempfile.TemporaryDirectory() as name, Peak():  # what the first use loads is no matter of the number of rows
        _load(
            StreamedRows.read("train", [Source(write_files(Path(name), 2000))], options, tokenizer, 100), tokenizer, 1
        )
    started = time.perf_counter()
    with Peak() as peak:
        rows = StreamedRows.read("train", [Source(files)], options, tokenizer, sample)
        read = time.perf_counter() - started
        first = _load(rows, tokenizer, 1)
        steps = _load(rows, tokenizer, STEPS)
    return {
        "rows": rows.index.num_rows,
        "blocks": len(rows.index.blocks),
        "thumbs_up": rows.class_counts[0] / sum(rows.class_counts),
        "pass_seconds": read,
        "rows_per_second_of_pass": rows.index.num_rows / read,
        "first_batch_seconds": first,
        "rows_per_second_of_loading": STEPS * ROWS_PER_STEP / steps,
        **peak.found,
    }


def _load(rows: Any, tokenizer: Any, steps: int) -> float:
    """Seconds of a loader's first steps, from nothing."""
    started = time.perf_counter()
    order = rows.order(ROWS_PER_STEP, balanced=False, shuffle_buffer=SHUFFLE_BUFFER)
    dataset = rows.dataset(tokenizer, ROWS_PER_STEP, ROWS_PER_STEP, False, SHUFFLE_BUFFER)
    for step in range(steps):
        dataset.__getitems__(order.rows_of_step(step))
    return time.perf_counter() - started


class Peak:
    """By how much anonymous memory peaks, looked at every hundredth of a second, its processes every fifth."""

    def __enter__(self) -> Peak:
        self._own = [_anonymous(), 0.0]
        self._all = [_of_all(), 0.0]
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        looks = 0
        while not self._ended.wait(0.01):
            looks += 1
            self._own[1] = max(self._own[1], _anonymous())
            if looks % 20 == 0:
                self._all[1] = max(self._all[1], _of_all())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()
        before, peak = self._own
        self.found = {"mib": peak - before, "mib_of_all_processes": max(peak - before, self._all[1] - self._all[0])}


def _anonymous() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def _of_all() -> float:
    """Anonymous memory of this process and its children; what they share is counted once."""
    children = Path("/proc/self/task").glob("*/children")
    numbers = ["self", *(number for file in children for number in file.read_text(encoding="utf-8").split())]
    total = 0
    for number in numbers:
        try:
            lines = Path(f"/proc/{number}/smaps_rollup").read_text(encoding="utf-8").splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon"))
        except (OSError, StopIteration):  # it has ended meanwhile
            continue
    return total / 1024


def in_a_process(files: str, mode: str) -> dict[str, Any]:
    """Measures in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--point", json.dumps([files, mode])],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return {"mode": mode, **json.loads(done.stdout.splitlines()[-1])}


def table(points: list[dict[str, Any]]) -> Table:
    """All figures, a row for each number of rows and mode."""
    made = Table("rows", "in advance", "seconds", "rows/s", "first batch, s", "loading, rows/s", "MiB", "of all, MiB")
    for point in points:
        made.add_row(
            f"{point['rows']:,}",
            point["mode"],
            f"{point['pass_seconds']:.1f}",
            f"{point['rows_per_second_of_pass']:,.0f}",
            f"{point['first_batch_seconds']:.3f}",
            f"{point['rows_per_second_of_loading']:,.0f}",
            f"{point['mib']:.0f}",
            f"{point['mib_of_all_processes']:.0f}",
        )
    return made


def main() -> None:
    """Measures every number of rows, prints a table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="numbers of rows")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(*json.loads(options.point))))
        return
    points = []
    for num_rows in options.rows:
        with tempfile.TemporaryDirectory() as name:
            files = write_files(Path(name), num_rows)
            points += [in_a_process(files, mode) for mode in MODES]
    Console().print(table(points))
    settings = {"rows_per_step": ROWS_PER_STEP, "steps": STEPS, "shuffle_buffer": SHUFFLE_BUFFER, "sample": SAMPLE}
    told = {"machine": machine.describe(), "settings": settings, "points": points}
    RESULTS.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
