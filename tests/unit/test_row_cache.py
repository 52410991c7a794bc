"""Tokenized rows are found again by the content of all that they depend on, and by nothing less."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from bco_lightning import FeedbackDataModule
from bco_lightning.data.row_cache import RowCache
from tests.conftest import write_jsonl
from tests.reliability.tiny_run import byte_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def start(log: Any, folder: Path, **options: Any) -> FeedbackDataModule:
    defaults = {"tokenizer": byte_tokenizer(), "max_length": 128, "cache_folder": str(folder)}
    module = FeedbackDataModule(log, **{**defaults, **options})
    module.setup("fit")
    return module


def was_found(caplog: pytest.LogCaptureFixture) -> bool:
    found = "rows: found as they were tokenized before" in caplog.text
    caplog.clear()
    return found


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")


def contents(module: FeedbackDataModule) -> Any:
    sets = [module.train_dataset, module.validation_dataset]
    return [list(rows) for rows in sets], module.counts, module.feedback_summary, module.fingerprints()


def test_the_second_start_finds_the_same_rows_and_counts(log: str, folder: Path, caplog: Any) -> None:
    first = contents(start(log, folder))
    assert not was_found(caplog)
    assert contents(start(log, folder)) == first
    assert was_found(caplog)


def test_what_was_printed_at_first_is_printed_again(log: str, folder: Path, caplog: Any) -> None:
    start(log, folder)
    first = caplog.text.splitlines()
    caplog.clear()
    start(log, folder)
    again = [line for line in caplog.text.splitlines() if "rows: found" not in line]
    assert [line.split(" ", 3)[-1] for line in again] == [line.split(" ", 3)[-1] for line in first]


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 48}, {"seed": 7}, {"validation_fraction": 0.3}, {"chat_template": "plain"}, {"conflicts": "drop"},
        {"long_prompts": "keep_start"}, {"bad_rows": "skip"}, {"loss_on": "all_turns"},
    ],
    ids=str,
)  # fmt: skip
def test_rows_read_with_other_options_are_not_taken(log: str, folder: Path, change: dict, caplog: Any) -> None:
    start(log, folder)
    start(log, folder, **change)
    assert not was_found(caplog)


def test_a_changed_byte_of_the_log_is_noticed(log: str, folder: Path, caplog: Any) -> None:
    first = start(log, folder, validation_fraction=0.0)
    text = Path(log).read_text()
    Path(log).write_text(text.replace("answer 3.", "answer 8.", 1))
    again = start(log, folder, validation_fraction=0.0)
    assert not was_found(caplog)
    assert again.fingerprints()["row_digest"] != first.fingerprints()["row_digest"]
    changed = [old["place"] for old, new in zip(first.train_dataset, again.train_dataset, strict=True) if old != new]
    assert changed == [f"{log}:4"]


def test_another_tokenizer_is_noticed(log: str, folder: Path, tokenizer: Any, caplog: Any) -> None:
    start(log, folder)
    start(log, folder, tokenizer=tokenizer)
    assert not was_found(caplog)


def test_options_of_training_do_not_matter(log: str, folder: Path, caplog: Any) -> None:
    start(log, folder)
    start(log, folder, batch_size=2, balanced_sampling=True, num_workers=1)
    assert was_found(caplog)


def test_a_damaged_file_is_read_anew(log: str, folder: Path, caplog: Any) -> None:
    first = contents(start(log, folder))
    [file] = folder.glob("rows/*/train.arrow")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert contents(start(log, folder)) == first
    assert not was_found(caplog)
    start(log, folder)
    assert was_found(caplog)


def test_only_the_owner_can_look_into_it(log: str, folder: Path) -> None:
    start(log, folder)
    assert [stat.S_IMODE(entry.stat().st_mode) for entry in (folder / "rows").iterdir()] == [0o700]


def test_nothing_is_kept_if_that_was_asked_for(log: str, folder: Path) -> None:
    start(log, folder, cache_rows=False)
    assert not folder.exists()


def test_a_failed_start_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    log = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "q", "completion": "a", "label": 4}])
    with pytest.raises(ValueError, match=r"bad\.jsonl:1"):
        start(log, folder)
    assert not list((folder / "rows").iterdir())


def test_a_folder_that_cannot_be_written_costs_the_cache_and_no_more(log: str, folder: Path, caplog: Any) -> None:
    folder.write_text("a file stands here")
    assert len(start(log, folder).train_dataset) > 0
    assert "rows: not kept for the next start" in caplog.text


def test_what_nobody_used_for_thirty_days_is_removed(log: str, folder: Path, rows: list, tmp_path: Path) -> None:
    start(log, folder)
    [old] = (folder / "rows").iterdir()
    long_ago = time.time() - 31 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    start(write_jsonl(tmp_path / "other.jsonl", rows[:20]), folder)
    assert not old.exists()
    assert len(list((folder / "rows").iterdir())) == 1


def test_an_entry_in_use_is_young_again(log: str, folder: Path) -> None:
    start(log, folder)
    [entry] = (folder / "rows").iterdir()
    os.utime(entry, (0, 0))
    start(log, folder)
    assert time.time() - entry.stat().st_mtime < 60


def test_a_hostile_manifest_is_no_more_than_a_miss(tmp_path: Path) -> None:
    entry = tmp_path / "key"
    entry.mkdir()
    for manifest in ("[]", "{", '{"row_sets": {"train": {}}}', json.dumps({"row_sets": {"t": None}, "summary": 1})):
        (entry / "manifest.json").write_text(manifest)
        assert RowCache(tmp_path)._find(entry) is None
