"""The program that made the packaged feedback log makes it again."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch

from bco_lightning.models.load import load_language_model, load_tokenizer
from tests.conftest import REAL_MODEL

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
make_feedback = importlib.import_module("make_feedback")


@pytest.mark.slow
@pytest.mark.real_model
def test_the_first_rows_are_sampled_and_rated_again_as_they_stand() -> None:
    """On the kind of CPU that made them: another may round a logit to the other side of a sample."""
    subjects = (ROOT / "benchmarks" / "subjects.txt").read_text(encoding="utf-8").split("\n")[:-1]
    generator = random.Random(0)
    generator.shuffle(subjects)
    rows = make_feedback._sample_rows(
        load_language_model(REAL_MODEL, torch.float32), load_tokenizer(REAL_MODEL), subjects[:16], 4, generator
    )
    log = ROOT / "src" / "bco_lightning" / "demo" / "heldout.jsonl"
    packaged = log.read_text(encoding="utf-8").splitlines()[: len(rows)]
    assert len(rows) > 50
    assert rows == [json.loads(line) for line in packaged]
