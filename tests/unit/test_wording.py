"""What the parser of the command line refuses, in one line: where, expected, found, and the nearest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from bco_lightning.cli.faults import in_words
from bco_lightning.cli.run import BCOArgumentParser
from bco_lightning.data import FeedbackDataModule
from bco_lightning.errors import ConfigError
from bco_lightning.module import BCOModule

ARGUMENTS = ("--model.name_or_path=x", "--data.train_files=y")
NONE = "expected an option, found none of that name; nearest are "


@pytest.fixture(scope="module")
def parser() -> BCOArgumentParser:
    parser = BCOArgumentParser(prog="python -m bco_lightning fit")
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.add_lightning_class_args(BCOModule, "model")
    parser.add_lightning_class_args(FeedbackDataModule, "data")
    parser.add_argument("--config", action="config")
    return parser


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model.bet=0.2"], f"--model.bet: {NONE}model.beta, "),
        (["--model.bet", "0.2"], f"--model.bet: {NONE}model.beta, "),
        (["--trainer.max_step", "3"], f"--trainer.max_step: {NONE}trainer.max_steps, "),
        (["--model.lora.rank=3"], "model.lora.rank: expected an option of LoraSettings, found none of that name; "),
        (["--model.lora={r: 4, alph: 2}"], "model.lora.alph: expected an option of LoraSettings, found none"),
        (["stray"], f"stray: {NONE}"),
        (["--model.beta=many"], "model.beta: expected a number, found many."),
        (["--model.lora=true"], "model.lora: expected a mapping or null, found true."),
        (["--trainer.max_epochs=many"], "trainer.max_epochs: expected a whole number or null, found many."),
        (["--trainer.detect_anomaly=perhaps"], "trainer.detect_anomaly: expected true or false, found perhaps."),
        (["--trainer.precision=banana"], "trainer.precision: expected a whole number or transformer-engine or "),
        (["--trainer.logger=CVSLogger"], "trainer.logger: expected a Logger such as CSVLogger, "),
        (["--trainer.callbacks+=EarlyStoping"], "trainer.callbacks: expected a Callback such as EarlyStopping, "),
        (
            ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStoping"],
            "trainer.callbacks: expected a class of lightning.pytorch.callbacks, found no EarlyStoping; near",
        ),
        (["--trainer.callbacks+=EarlyStopping"], "trainer.callbacks: EarlyStopping: monitor: expected a value"),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monito=val/loss"],
            "trainer.callbacks.monito: expected an option of EarlyStopping, found none of that name; nearest are mo",
        ),
        (["--config={model: {bta: 1}}"], f"model.bta: {NONE}model.beta, "),
        (["--config=[1]"], "config: "),
        (["--config=c.yaml"], "c.yaml:3: expected YAML, found a mistake: "),
        (["--config=d.yaml"], f"trainer.max_step: {NONE}trainer.max_steps, "),
        (["--config=list.yaml"], "config: expected a mapping of options, found YAML that is none."),
        (["--config=gone.yaml"], "config: File does not exist: "),
    ],
)  # fmt: skip
def test_what_is_wrong_on_the_command_line_or_in_a_file_is_one_line(
    given: list[str], said: str, parser: BCOArgumentParser
) -> None:
    Path("c.yaml").write_text("model:\n  beta: 0.1\n lora: {r: 4\n")
    Path("d.yaml").write_text("trainer:\n  max_step: 3\n")
    Path("list.yaml").write_text("- a\n- b\n")
    with pytest.raises(ConfigError) as caught:
        parser.parsed([*ARGUMENTS, *given])
    found = str(caught.value)
    assert found.startswith(said)
    assert "\n" not in found
    assert len(found) < 500
    assert found.endswith(("See python -m bco_lightning fit --help.", caught.value.problem))


def test_what_is_missing_for_a_class_is_said_in_the_words_of_its_library(parser: BCOArgumentParser) -> None:
    options = parser.parse_args([*ARGUMENTS, "--trainer.logger=CometLogger"])
    with pytest.raises(Exception) as caught:  # noqa: PT011
        parser.instantiate(options)
    found: Any = in_words(caught.value)
    assert str(found).startswith("lightning.pytorch.loggers.CometLogger: Requirement 'comet-ml")
