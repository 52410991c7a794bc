"""S13: releases that were malicious are excluded by name, lower bounds are spelled out, and what is installed obeys."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.trials import Trials

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # of pytest

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"


def declared() -> list[Requirement]:
    """Requirements of pyproject.toml that hold on this Python, those of the extras for demo and tests included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [
        *project["dependencies"],
        *(
            text
            for name, extra in project["optional-dependencies"].items()
            if name not in ("fuzz", "quantized", "ui", "docs", "completion")  # what nobody needs for a run
            for text in extra
        ),
    ]
    requirements = [Requirement(text) for text in texts]
    return [requirement for requirement in requirements if requirement.marker is None or requirement.marker.evaluate()]


def outside_the_bounds() -> list[str]:
    """What is installed and should not be; :mod:`tests.conftest` stops the session on it."""
    found = []
    for needed in declared():
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        if not needed.specifier.contains(version, prereleases=True):
            found.append(f"{needed.name} {version}, expected {needed.specifier}")
    return found


def requirement(name: str) -> Requirement:
    return next(found for found in declared() if found.name == name)


@pytest.mark.promise("S13", "malicious and vulnerable releases are outside the declared bounds")
def test_bad_releases_are_refused(trials: Trials) -> None:
    cases = [
        ("lightning", "2.6.2"),
        ("lightning", "2.6.3"),
        ("lightning", "2.6.5"),
        ("torch", "2.9.1"),
        ("torch", "2.6.0"),
    ]
    for trial in trials(cases, quick=len(cases)):
        with trial as (name, version):
            assert not requirement(name).specifier.contains(version)
    spelled_out = {str(specifier) for specifier in requirement("lightning").specifier}
    assert {"!=2.6.2", "!=2.6.3"} <= spelled_out
    lowest = {
        name: min(Version(s.version) for s in requirement(name).specifier if s.operator == ">=")
        for name in ("lightning", "torch")
    }
    assert lowest["lightning"] >= Version("2.6.6")
    assert lowest["torch"] >= Version("2.10")


@pytest.mark.promise("S13", "what is installed satisfies every declared bound")
def test_what_is_installed_is_within_the_bounds(trials: Trials) -> None:
    cases = sorted({requirement.name for requirement in declared()})
    assert {"torch", "lightning", "transformers", "peft"} <= set(cases)
    for trial in trials(cases, quick=len(cases)):
        with trial as name:
            installed = importlib.metadata.version(name)
            assert all(r.specifier.contains(installed, prereleases=True) for r in declared() if r.name == name), (
                installed
            )


def test_every_dependency_has_a_lower_bound() -> None:
    assert not [str(r) for r in declared() if not any(s.operator in (">=", "==") for s in r.specifier)]


@pytest.mark.promise("S13", "every dependency but PyTorch is pinned by hash, without a host or a path")
def test_the_lock_pins_every_dependency_by_hash() -> None:
    text = LOCK.read_text(encoding="utf-8")
    entries = [entry for entry in re.split(r"\n(?=\S)", text) if entry.strip() and not entry.startswith("#")]
    assert all(re.match(r"[a-z0-9.-]+==\S+.*\\\n\s+--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    pinned = {entry.split("==")[0] for entry in entries}
    wanted = {re.sub(r"[-_.]+", "-", r.name).lower() for r in declared()} - {"torch"}
    assert wanted <= pinned, wanted - pinned
    assert not re.search(r"://|\s/\w|^-", text, flags=re.MULTILINE)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition(";")[0].strip().partition("==")
        if version and re.sub(r"[-_.]+", "-", name).lower() in pinned:
            assert f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}" in text


def test_the_oldest_session_has_the_lower_bounds() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    bounds = {needed.name: found[1] for needed in declared() if (found := re.search(r">=([\w.]+)", str(needed)))}
    assert {name: bounds[name] for name in pinned} == pinned
    assert {"torch", "transformers", "lightning", "peft", "datasets", "pyarrow", "fsspec"} <= pinned.keys()
