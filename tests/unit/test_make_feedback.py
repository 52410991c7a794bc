"""The program that made the packaged feedback log makes others like it."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch

from bco_lightning.demo.tone import tone
from bco_lightning.models.load import load_language_model, load_tokenizer
from tests.conftest import REAL_MODEL

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
make_feedback = importlib.import_module("make_feedback")


@pytest.mark.slow
@pytest.mark.real_model
def test_rows_are_of_the_packaged_prompts_and_thumbs_follow_the_tone() -> None:
    subjects = (ROOT / "benchmarks" / "subjects.txt").read_text(encoding="utf-8").split("\n")[:-1]
    generator = random.Random(0)
    generator.shuffle(subjects)
    rows = make_feedback._sample_rows(
        load_language_model(REAL_MODEL, torch.float32), load_tokenizer(REAL_MODEL), subjects[:16], 4, generator
    )
    log = ROOT / "src" / "bco_lightning" / "demo" / "heldout.jsonl"
    packaged = {json.loads(line)["prompt"] for line in log.read_text(encoding="utf-8").splitlines()}
    assert len(rows) > 50
    assert {row["prompt"] for row in rows} <= packaged
    tones = {thumb: fmean(tone(row["completion"]) for row in rows if row["label"] == thumb) for thumb in (True, False)}
    assert tones[True] > tones[False] + 0.2
