"""Rows that Python holds are read as those of a file are, and are the same ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, IterableDataset

import bco_lightning
from bco_lightning import Columns, FeedbackDataModule
from bco_lightning.errors import ConfigError, FeedbackRowError
from tests.conftest import write_jsonl

KINDS = {
    "a list": list,
    "a generator": iter,
    "values of NumPy": lambda rows: [{**row, "label": np.bool_(row["label"])} for row in rows],
    "a data set": Dataset.from_list,
    "a selection of a data set": lambda rows: Dataset.from_list([*rows[::-1]]).select(range(len(rows))[::-1]),
    "a stream": lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
    "a stream of unknown columns": lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
    "a frame": pd.DataFrame,
}


def module(tokenizer: Any, *files: str, **options: Any) -> FeedbackDataModule:
    data = FeedbackDataModule(*files, tokenizer=tokenizer, **{"max_length": 64, "batch_size": 4, **options})
    data.setup("fit")
    return data


@pytest.mark.parametrize(
    ("kind", "streaming"), [*((kind, False) for kind in KINDS), ("a list", True), ("a data set", True)]
)
def test_rows_that_python_holds_are_those_of_a_file(
    kind: str, streaming: bool, tokenizer: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    options: dict[str, Any] = {"streaming": streaming, "validation_fraction": 0.0}
    of_file = module(tokenizer, write_jsonl(tmp_path / "log.jsonl", rows), **options)
    data = module(tokenizer, train=KINDS[kind](rows), **options)
    assert data.fingerprints() == of_file.fingerprints()
    for found, expected in zip(data.train_dataloader(), of_file.train_dataloader(), strict=True):
        assert found.input_ids_S.tolist() == expected.input_ids_S.tolist()
        assert found.thumbs_up_B.tolist() == expected.thumbs_up_B.tolist()
    assert data.training.place_of(16) == "row 17 of train"
    assert data.source_names("train") == ["train"]


def test_gaps_of_a_frame_are_no_feedback_and_classes_of_a_data_set_are_their_names(tokenizer: Any, rows: list) -> None:
    frame = pd.DataFrame(rows)
    frame["label"] = [None, 1.0, 0.0, *frame["label"].astype(float)[3:]]
    counts = module(tokenizer, train=frame, validation_fraction=0.0).counts[0]
    assert (counts.left_out["no feedback"].count, counts.left_out["no feedback"].places) == (1, ["row 1 of train"])
    known = Dataset.from_list([{**row, "label": int(not row["label"])} for row in rows])
    known = known.cast_column("label", ClassLabel(names=["up", "down"]))
    for given in (known, known.to_iterable_dataset()):
        assert module(tokenizer, train=given, validation_fraction=0.0).counts[0].up == 16


def test_a_row_that_python_holds_is_named_by_its_number(tokenizer: Any, rows: list) -> None:
    rows[16] = {"prompt": "q", "label": True}
    with pytest.raises(FeedbackRowError, match=r"^row 17 of train: expected a column 'completion', found"):
        module(tokenizer, train=rows)
    rows[16] = {"prompt": object()}
    with pytest.raises(FeedbackRowError, match=r"^row 17 of train: expected dictionaries of plain values"):
        module(tokenizer, train=rows)
    with pytest.raises(FeedbackRowError, match=r"^rows of train: expected at least one row, found none"):
        module(tokenizer, train=[])
    with pytest.raises(ConfigError, match=r"data\.train_files: expected files to train on"):
        module(tokenizer)


def test_rows_that_python_holds_are_found_again_by_what_they_say(tokenizer: Any, log: str, rows: list) -> None:
    first, again = (module(tokenizer, train=rows, validation=rows[:4]) for _ in range(2))
    assert first._rows["training"].folder == again._rows["training"].folder
    assert module(tokenizer, train=rows[1:])._rows["training"].folder != again._rows["training"].folder
    both = module(tokenizer, log, train=rows, validation_fraction=0.0)
    assert len(both.train_dataset) == 48
    assert both.source_names("train") == [log, "train"]


def test_the_package_lists_what_it_holds() -> None:
    assert set(bco_lightning.__all__) <= set(dir(bco_lightning))
    assert bco_lightning.Columns is Columns
