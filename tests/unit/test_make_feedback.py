"""The program that made the packaged feedback log makes it again."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from bco_lightning.demo import make_feedback
from bco_lightning.models.load import load_language_model, load_tokenizer
from tests.conftest import REAL_MODEL

FOLDER = Path(make_feedback.__file__).parent


@pytest.mark.slow
@pytest.mark.real_model
def test_the_first_rows_are_sampled_and_rated_again_as_they_stand() -> None:
    """On the kind of CPU that made them: another may round a logit to the other side of a sample."""
    subjects = (FOLDER / "subjects.txt").read_text(encoding="utf-8").split("\n")[:-1]
    generator = random.Random(0)
    generator.shuffle(subjects)
    rows = make_feedback._sample_rows(
        load_language_model(REAL_MODEL, torch.float32), load_tokenizer(REAL_MODEL), subjects[:16], 4, generator
    )
    packaged = (FOLDER / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[: len(rows)]
    assert len(rows) > 50
    assert rows == [json.loads(line) for line in packaged]
