"""What lies in the working folder is data: no module beside a log and no program that a repository names is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bco_lightning.identity import git_revision
from tests.reliability.tiny_run import ROOT

# Of the standard library, of packages that are there, and of some that are looked for only to see whether they are.
MODULES = ("typing", "hashlib", "dataclasses", "yaml", "torch", "lightning", "megatron", "bitsandbytes")


def plant_modules(marker: Path) -> None:
    for name in MODULES:
        Path(f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write({name + ' '!r})\n")


@pytest.mark.parametrize("command", [["-m", "bco_lightning.errors"], ["-mbco_lightning.errors"]])
def test_modules_beside_a_log_are_not_imported(command: list[str], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    plant_modules(marker)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run([sys.executable, *command], env=environment, check=True, timeout=60)
    assert not marker.exists()
    # The plant works: where the user asks for the working folder, it is looked through first.
    environment["PYTHONPATH"] = f".:{environment['PYTHONPATH']}"
    subprocess.run([sys.executable, *command], env=environment, check=False, timeout=60, capture_output=True)
    assert marker.exists()


@pytest.mark.slow
def test_a_whole_command_imports_nothing_of_the_working_folder(tmp_path: Path) -> None:
    plant_modules(tmp_path / "marker")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "BCO_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "bco_lightning", "fit", "--help"]
    subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True)
    assert not (tmp_path / "marker").exists()


PROGRAMS = (
    "core.fsmonitor", "filter.planted.clean", "filter.planted.process", "core.pager", "pager.rev-parse",
    "core.hooksPath", "core.sshCommand", "core.alternateRefsCommand", "diff.external", "gpg.program", "alias.rev-parse",
)  # fmt: skip


def test_a_repository_runs_no_program_that_it_names(tmp_path: Path) -> None:
    marker, program = tmp_path / "marker", tmp_path / "program.sh"
    program.write_text(f"#!/bin/sh\necho ran >> {marker}\ncat\n")
    program.chmod(0o755)

    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], check=True, capture_output=True)  # noqa: S607

    git("init", "-q")
    Path(".gitattributes").write_text("* filter=planted\n")
    Path("log.jsonl").write_text("{}\n")
    git("add", "log.jsonl")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "x")
    Path("log.jsonl").write_text("{} \n")
    for name in PROGRAMS:
        git("config", name, f"!{program}" if name.startswith("alias") else str(program))
    revision = git_revision()
    assert revision is not None
    assert len(revision) == 40
    assert not marker.exists()
    git("status")  # the plant works
    assert marker.exists()
