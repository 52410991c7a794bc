"""Help and misspelt options are answered from packaged texts, which are those of the parser."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from bco_lightning import cli, help_texts
from bco_lightning.help_texts import COMMANDS, answer

WIDTHS = (40, 80, 137)
REMEDY = "Options or their descriptions have changed: run `make help-texts` (python -m bco_lightning.help_texts)."
# In a process of its own, since help lists the subclasses that were imported, and tests have some.
LIVE = f"""
import json, os
from bco_lightning.help_texts import COMMANDS, record
printed = {{}}
for width in {WIDTHS}:
    os.environ["COLUMNS"] = str(width)
    printed[width] = {{command: record(command)[0] for command in ("", *COMMANDS)}}
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def live() -> dict[str, dict[str, str]]:
    done = subprocess.run([sys.executable, "-c", LIVE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.fixture
def _packaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts are taken whatever they were made from; whether that is stale is a test of its own."""
    made_from = json.loads(help_texts.FILE.read_text())["made_from"]
    monkeypatch.setattr(help_texts, "made_from", lambda: made_from)


@pytest.mark.usefixtures("_packaged")
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_packaged_help_is_what_the_parser_prints_at_any_width(
    command: str, live: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for width in WIDTHS:
        monkeypatch.setenv("COLUMNS", str(width))
        assert answer([*([command] if command else []), "--help"]) == 0
        assert capsys.readouterr().out == live[str(width)][command], REMEDY


def test_packaged_help_is_made_from_the_options_as_they_are() -> None:
    assert json.loads(help_texts.FILE.read_text())["made_from"] == help_texts.made_from(), REMEDY


def test_help_of_other_versions_is_left_to_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    made_from = help_texts.made_from()
    monkeypatch.setattr(help_texts, "made_from", lambda: {**made_from, "lightning": "0.0"})
    assert answer(["fit", "--help"]) is None
    assert answer(["fit", "--model.betaa=1"]) is None


@pytest.mark.usefixtures("_packaged")
@pytest.mark.parametrize("words", [["--model.betaa=1"], ["--betaa", "1"], ["--trainer.foo", "3"], ["--model.betaa"]])
def test_a_misspelt_option_is_answered_as_the_parser_does(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["fit", "--model.name_or_path=x", *words]) == 2
    quick = capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["fit", "--model.name_or_path=x", *words])
    assert caught.value.code == 2
    assert quick == capsys.readouterr().err


@pytest.mark.usefixtures("_packaged")
@pytest.mark.parametrize(
    "words",
    [
        ["--model.bet=0.2"],  # argparse completes it
        ["--model.lora.rank=3"],  # the class says what it takes
        ["--trainer.logger.init_args.name=x"],
        ["--trainer.callbacks+=RunCheckpoint", "--trainer.callbacks.init_args.keep=3"],
        ["--print_config=skip_default"],
        ["--data.train_files+=x.jsonl"],
        ["--api_key=hf_abcdefghijklmnopqrstuvwxyz"],  # would be shown
        ["--help", "--model.beta=1"],
        [],
    ],
)
def test_whatever_may_be_right_is_left_to_the_parser(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["fit", *words]) is None
    assert answer(words) is None
    assert answer(["export", *words]) is None
    assert capsys.readouterr() == ("", "")


def test_help_needs_no_pytorch() -> None:
    program = """
import runpy, sys
sys.argv = ["bco_lightning", "fit", "--help"]
try:
    runpy.run_module("bco_lightning", run_name="__main__")
except SystemExit as left:
    print(left.code, {"torch", "lightning", "transformers"} & set(sys.modules))
"""
    environment: dict[str, Any] = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "0 set()", REMEDY
