"""What is odd about a log as a whole is shown before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bco_lightning import FeedbackDataModule
from tests.reliability.tiny_run import byte_tokenizer
from tests.trials import Trials


def write(path: Path, rows: list[tuple[str, str, bool]]) -> str:
    lines = (json.dumps({"prompt": prompt, "completion": answer, "label": thumb}) for prompt, answer, thumb in rows)
    path.write_text("\n".join(lines))
    return str(path)


def hundred_rows(seed: int) -> list[tuple[str, str, bool]]:
    """65 answers to few prompts, 15 of them logged twice, 10 with a second row of the other thumb."""
    import random

    answers = [(f"q{number % 7}", f"a{number}", number % 2 == 0) for number in range(75)]
    rows = answers + answers[10:25] + [(prompt, answer, not thumb) for prompt, answer, thumb in answers[30:40]]
    random.Random(seed).shuffle(rows)
    return rows


@pytest.mark.promise("S15", "duplicates, contradictions and the largest source are shown, exactly, before training")
def test_poisoned_feedback_is_visible(trials: Trials, tmp_path: Path, capsys: Any, caplog: Any) -> None:
    cases = [(seed, options) for seed in range(10) for options in ({}, {"validation_fraction": 0.3}, {"max_length": 9})]
    for trial in trials(cases, quick=6):
        with trial as (seed, options):
            rows = hundred_rows(seed)
            assert len(rows) == 100
            files = [write(tmp_path / "big.jsonl", rows[:60]), write(tmp_path / "small.jsonl", rows[60:])]
            module = FeedbackDataModule(files, tokenizer=byte_tokenizer(), **{"max_length": 64, **options})
            caplog.clear()
            module.setup("fit")
            summary = module.feedback_summary
            assert (summary.rows, summary.duplicates, summary.contradictions) == (100, 15, 10)
            assert summary.largest_source == (files[0], 0.6)
            shown = "15 rows repeat an earlier one, 10 answers have thumbs of both kinds, 60% of the rows are from"
            assert f"{shown} {files[0]}" in caplog.text


def test_a_clean_log_of_one_file_has_nothing_to_show(tmp_path: Path) -> None:
    log = write(tmp_path / "log.jsonl", [("q", "a", True), ("q", "b", False), ("r", "a", False)])
    module = FeedbackDataModule(log, tokenizer=byte_tokenizer(), validation_fraction=0.0)
    module.setup("fit")
    assert str(module.feedback_summary) == "feedback: 0 rows repeat an earlier one, 0 answers have thumbs of both kinds"
