"""Writes ``tests/RELIABILITY.md`` from what the trials and the seeded defects noted in ``tests/trials.json``."""

from __future__ import annotations

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent
FUZZED = 100_000  # inputs of a fuzzer outnumber all other trials
RECORD, TABLE = FOLDER / "trials.json", FOLDER / "RELIABILITY.md"

HEAD = """# Promises and their trials

Written by `make reliability` (all trials) and `make defects` (each defect planted into a copy of the source, and the
trial that has to turn red on it); not by hand. `make test` runs a few trials of each row. Two CPU cores, no GPU.

Totals: {passed:,} of {run:,} trials passed, fuzzed lines left out; {red} of {planted} seeded defects were seen.

| row | promise | trials passed / run | seen red on |
|---|---|---|---|
"""

NOTES = """
## What is not promised

- **FSDP2** was tried on two and four CPU processes (gloo), never on GPUs. Exact resume to the bit holds for
  the same number of processes and strategy; with others, weights agree to 1e-5.
- **Parts of a checkpoint** that several processes write need a folder that all of them see, or the save is refused.
- **GPUs**: nothing here ran on one. Kernels that are not deterministic make two runs differ, and so a resumed one.
- **A kill between two optimizer steps without a signal** (SIGKILL, power) loses the steps since the last checkpoint.
- **Network file systems** whose rename is not atomic, or whose fsync does nothing, take the promise of R6 away.
- **A validation that was due or under way** when a run stopped is done from its first row when the run goes on.
- **The roles of a template without control tokens** (such as `User:` in plain text) can be imitated by any text.
- **A hung process** ends when its launcher kills it; what is promised is that the others do not wait for it.
"""


def render(record: dict[str, dict[str, dict[str, object]]]) -> str:
    """The table as Markdown."""
    lines: list[str] = []
    passed = run = red = planted = 0
    for row in sorted(record, key=lambda name: (name[0], int(re.sub(r"\D", "", name)))):
        merged: dict[str, list[int]] = {}
        for test in record[row].get("tests", {}).values():
            promise = str(test["promise"])  # type: ignore[index]
            counts = merged.setdefault(promise[0].upper() + promise[1:], [0, 0])
            counts[0] += int(test["passed"])  # type: ignore[index]
            counts[1] += int(test["run"])  # type: ignore[index]
        defects = record[row].get("red", {})
        red, planted = red + sum(bool(seen) for seen in defects.values()), planted + len(defects)
        seen_on = "; ".join(what if seen else f"NOT SEEN: {what}" for what, seen in sorted(defects.items()))
        for number, (promise, (ok, tried)) in enumerate(merged.items()):
            if tried < FUZZED:
                passed, run = passed + ok, run + tried
            lines.append(
                f"| {row if not number else ''} | {promise} | {ok} / {tried} | {seen_on if not number else ''} |"
            )
    return HEAD.format(passed=passed, run=run, red=red, planted=planted) + "\n".join(lines) + "\n" + NOTES


if __name__ == "__main__":
    TABLE.write_text(render(json.loads(RECORD.read_text())), encoding="utf-8")
    print(f"{TABLE} written")
