"""A label means what its source's one closed vocabulary says, never what Python takes for true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from bco_lightning import FeedbackDataModule
from bco_lightning.batch import LeftOut
from bco_lightning.data import Columns
from bco_lightning.data.labels import LabelVocabulary
from bco_lightning.errors import FeedbackRowError
from tests.reliability.tiny_run import byte_tokenizer
from tests.trials import Trials

UNRATED = LeftOut("log.jsonl:1", "no feedback")
# What each look-alike means: thumbs-up, thumbs-down, no feedback, or nothing at all.
LOOK_ALIKES: list[tuple[Any, bool | LeftOut | None]] = [
    (1, True), (0, False), (-1, False), ("true", True), ("false", False), ("👍", True), ("👎", False),
    ("0", None), ("1", None), ("-1", None), (1.0, True), (0.0, False), (-1.0, False), ("True", True), ("False", False),
    ("yes", None), ("Up", None), (" up", None), ("👍🏽", None), ("+1", None), (float("nan"), None),
    (None, UNRATED), ([], None), ({}, None), ([True], None), ("", UNRATED), (2, None), (3.5, None), (10**40, None),
    (float("inf"), None),
]  # fmt: skip
MIXTURES: list[tuple[Any, Any]] = [
    (True, 1), (1, True), (0, -1), (-1, 0), (1, "up"), ("up", "true"), ("true", True), ("👍", "down"), (False, 0),
]  # fmt: skip


def label(*values: Any, columns: Columns | None = None) -> list[bool | LeftOut]:
    labels = LabelVocabulary((columns or Columns()).thumbs)
    return [labels.thumbs_up(value, f"log.jsonl:{line}") for line, value in enumerate(values, 1)]


@pytest.mark.promise("S8", "each look-alike of a label is read by the vocabulary or refused by file and line")
def test_a_look_alike_is_no_label(trials: Trials) -> None:
    for trial in trials(LOOK_ALIKES, quick=len(LOOK_ALIKES)):
        with trial as (value, meaning):
            if meaning is not None:
                assert label(value) == [meaning]
                continue
            with pytest.raises(FeedbackRowError, match=r"^log\.jsonl:1: label must be one of true/false, 1/0, 1/-1"):
                label(value)


@pytest.mark.promise("S8", "a mixture of two vocabularies is refused")
def test_a_mixture_of_vocabularies_is_refused(trials: Trials) -> None:
    for trial in trials(MIXTURES, quick=len(MIXTURES)):
        with trial as pair, pytest.raises(FeedbackRowError, match=r"^log\.jsonl:2: label .* mixes two vocabularies"):
            label(*pair)


@pytest.mark.parametrize("value", [4, 3.5, 2, -2, 10**40])
def test_what_looks_like_a_rating_says_how_to_give_a_rule(value: Any) -> None:
    with pytest.raises(FeedbackRowError, match=r"looks like a rating, .* convert the column .* data\.columns\.thumbs"):
        label(value)


def test_a_map_gives_every_label_its_meaning_and_refuses_all_others() -> None:
    rating = Columns(thumbs={"1": "down", "2": "down", "4": "up", "5": "up", "good": "up", "null": "down"})
    assert label(5, 4, 2, 1, "good", None, columns=rating) == [True, True, False, False, True, False]
    assert label(5.0, "", columns=rating) == [True, LeftOut("log.jsonl:2", "no feedback")]
    for other in (3, True, "5.0", "Good", [], "up", 1.5):
        with pytest.raises(FeedbackRowError, match=r"log\.jsonl:1: label must be one of data\.columns\.thumbs"):
            label(other, columns=rating)


def test_a_map_can_be_given_on_the_command_line_and_in_yaml(tmp_path: Path) -> None:
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(FeedbackDataModule, "data", skip={"tokenizer"})
    given = parser.parse_args(["--data.columns.thumbs", '{"good": up, "5": down}'])
    assert given.data.columns.thumbs == {"good": "up", "5": "down"}
    config = tmp_path / "config.yaml"
    config.write_text('data:\n  columns:\n    thumbs: {good: up, "bad": down}\n')
    assert parser.parse_args([f"--config={config}"]).data.columns.thumbs == {"good": "up", "bad": "down"}


def test_the_cells_of_a_csv_are_texts_to_a_map(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("prompt,completion,label\na,b,5\nc,d,1\ne,f,True\n")
    columns = Columns(thumbs={"5": "up", "1": "down", "True": "up"})
    module = FeedbackDataModule("log.csv", tokenizer=byte_tokenizer(), columns=columns, validation_fraction=0.0)
    module.setup("fit")
    assert module.train_dataset["thumbs_up"] == [True, False, True]


@pytest.mark.parametrize("value", ["I was born in Bremen.", "ann@b.org", 491701234567, ["my secret"], {"my": "secret"}])
def test_a_label_that_could_be_private_is_not_shown(value: Any) -> None:
    with pytest.raises(FeedbackRowError) as caught:
        label(value)
    assert not any(word in str(caught.value) for word in ("Bremen", "ann", "4917", "secret"))


def test_a_column_name_that_could_be_private_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps({"I was born in Bremen.": 1, "prompt": "a", "my_rating": 5}))
    module = FeedbackDataModule("log.jsonl", tokenizer=byte_tokenizer())
    with pytest.raises(FeedbackRowError, match=r"found a text of 21 characters, 'prompt', 'my_rating'") as caught:
        module.setup("fit")
    assert "Bremen" not in str(caught.value)
