"""Help that was printed once comes at once, for as long as it is what the command line would print."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest

from bco_lightning.cli import app
from bco_lightning.cli import help as help_
from bco_lightning.cli.app import main

QUICK = """
import runpy, sys
sys.argv = ["bco_lightning", "plan", "--help"]
try:
    runpy.run_module("bco_lightning", run_name="__main__")
except SystemExit as left:
    print(left.code, {"torch", "lightning", "transformers", "jsonargparse"} & set(sys.modules))
"""

WORDS = {
    "bco-lightning pl": "plan",
    "bco-lightning fit --model.bet": "--model.beta",
    "bco-lightning fit --data.max_p": "--data.max_prompt_length",
    "bco-lightning plan --gpu": "--gpu_memory --gpus",
}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        main(list(arguments))
    return capsys.readouterr().out


def test_the_second_help_is_the_first_one_and_needs_no_pytorch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    first = printed(capsys, "plan", "--help")
    assert "--gradient_checkpointing" in first
    done = subprocess.run([sys.executable, "-c", QUICK], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == f"{first}0 set()\n"


def test_help_of_other_versions_files_or_widths_is_not_taken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    first = printed(capsys, "export", "-h")
    assert help_.kept_help(["export", "-h"]) == first
    monkeypatch.setenv("COLUMNS", "120")
    assert help_.kept_help(["export", "-h"]) is None
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(help_, "version", lambda package: "0.0")
    assert help_.kept_help(["export", "-h"]) is None


def test_a_usage_line_names_every_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    usage = printed(capsys, "--help").partition("\n\n")[0]
    assert [name for name in help_.COMMANDS if name not in usage] == []


def test_a_shell_completes_commands_and_their_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "COMMANDS", ("fit", "plan"))  # the others in the same way
    assert main(["completion", "bash"]) == 0
    tab = "; _shtab_bco_lightning; echo ${COMPREPLY[@]}"
    asked = [f"COMP_WORDS=({words}); COMP_CWORD={words.count(' ')}{tab}" for words in WORDS]
    script = "\n".join([capsys.readouterr().out, *asked])
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)  # noqa: S607
    assert done.stdout.splitlines() == list(WORDS.values())


def test_completion_says_what_to_install(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    assert main(["completion", "zsh"]) == 2
    assert "pip install 'bco-lightning[completion]'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["plan", "--gpus"], ["plan", "--help", "--model=8B"], ["nothing", "--help"], []])
def test_nothing_else_is_kept(words: list[str]) -> None:
    with contextlib.suppress(SystemExit), help_.keeping_help(words):
        print("something")
        raise SystemExit(0)
    assert help_.kept_help(words) is None
