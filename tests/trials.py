"""Promises as counted trials: each row of tests/RELIABILITY.md is a test that says how many trials it passed.

A test marked ``@pytest.mark.promise("R1", "exact resume")`` takes the ``trials`` fixture and loops over its cases. A
quick run takes a few of them, spread evenly; ``--full-trials`` takes all. ``--trial TEXT`` runs the cases that hold the
text, to replay a red one alone. ``--record-trials`` writes the counts into ``tests/trials.json``, from which the table
is made.
"""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from filelock import FileLock

RECORD = Path(__file__).parent / "trials.json"


class Trial:
    """One case: as a context manager it takes note of a failure and lets the other cases run."""

    def __init__(self, case: Any, trials: Trials) -> None:
        self.case, self._trials = case, trials

    def __enter__(self) -> Any:
        return self.case

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        self._trials.run += 1
        if kind is None or not issubclass(kind, Exception):
            return False
        self._trials.failures.append(f"{self.case!r}:\n{''.join(traceback.format_exception(error)[-3:])}")
        return True


class Trials:
    """The cases of one test, and how many of them passed."""

    def __init__(self, full: bool, only: str | None) -> None:
        self.full, self._only = full, only
        self.run, self.failures = 0, list[str]()

    def __call__(self, cases: Sequence[Any], quick: int) -> Iterator[Trial]:
        """Yields each case of a full run, or ``quick`` of them, evenly spread."""
        cases = list(cases)
        if self._only is not None:
            cases = [case for case in cases if self._only in repr(case)]
            if not cases:
                pytest.exit(f"no trial is called {self._only!r}", returncode=4)
        elif not self.full and quick < len(cases):
            cases = [cases[(number * len(cases)) // quick] for number in range(quick)]
        for case in cases:
            yield Trial(case, self)

    def count(self, quick: int, full: int) -> int:
        """How many random trials to make."""
        return full if self.full else quick


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-trials", action="store_true", help="run all trials of each promise, not a few")
    parser.addoption("--record-trials", action="store_true", help="write the counts into tests/trials.json")
    parser.addoption("--trial", help="run only the cases whose description holds this text")


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Trials:
    counted = Trials(request.config.getoption("--full-trials"), request.config.getoption("--trial"))
    request.node.trials = counted
    return counted


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    started = time.monotonic()
    crashed = True
    try:
        result = yield
        crashed = False
    finally:
        _record(pyfuncitem, crashed, time.monotonic() - started)
    counted = getattr(pyfuncitem, "trials", None)
    if counted is not None and counted.failures:
        shown = "\n".join(counted.failures[:3])
        pytest.fail(
            f"{len(counted.failures)} of {counted.run} trials failed, the first of them:\n{shown}", pytrace=False
        )
    return result


def _record(item: pytest.Function, crashed: bool, seconds: float) -> None:
    marker = item.get_closest_marker("promise")
    if marker is None or not item.config.getoption("--record-trials"):
        return
    counted = getattr(item, "trials", None)
    run = max(counted.run, 1) if counted else 1
    passed = 0 if crashed and not (counted and counted.run) else run - (len(counted.failures) if counted else 0)
    with FileLock(Path(tempfile.gettempdir()) / "bco_lightning-trials.lock"):  # several processes run tests
        known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        row = known.setdefault(marker.args[0], {})
        row.setdefault("tests", {})[item.name] = {
            "promise": marker.args[1],
            "passed": passed - (1 if crashed and passed == run else 0),
            "run": run,
            "seconds": round(seconds, 1),
        }
        RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
