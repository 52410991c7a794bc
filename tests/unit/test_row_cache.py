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
from bco_lightning.data import Columns, Rating, Source
from bco_lightning.data.row_cache import _find
from tests.conftest import write_jsonl
from tests.reliability.tiny_run import byte_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def start(log: Any, folder: Path, **options: Any) -> FeedbackDataModule:
    defaults = {"tokenizer": byte_tokenizer(), "max_length": 128, "cache_folder": str(folder)}
    module = FeedbackDataModule(**{"train_files": log, **defaults, **options})
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
        {"max_length": 48}, {"seed": 7}, {"validation_fraction": 0.3}, {"chat_template": "plain"},
        {"conflicts": "drop"}, {"long_prompts": "keep_start"}, {"bad_rows": "skip"}, {"loss_on": "all_turns"},
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
    [file] = folder.glob("tokenized_rows/*/train.arrow")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert contents(start(log, folder)) == first
    assert not was_found(caplog)
    start(log, folder)
    assert was_found(caplog)


def test_only_the_owner_can_look_into_it(log: str, folder: Path) -> None:
    start(log, folder)
    assert [stat.S_IMODE(entry.stat().st_mode) for entry in (folder / "tokenized_rows").iterdir()] == [0o700]


def test_nothing_is_kept_if_that_was_asked_for(log: str, folder: Path) -> None:
    start(log, folder, cache_rows=False)
    assert not folder.exists()


def test_a_failed_start_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    log = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "q", "completion": "a", "label": 4}])
    with pytest.raises(ValueError, match=r"bad\.jsonl:1"):
        start(log, folder)
    assert not list((folder / "tokenized_rows").iterdir())


def test_a_folder_that_cannot_be_written_costs_the_cache_and_no_more(log: str, folder: Path, caplog: Any) -> None:
    folder.write_text("a file stands here")
    assert len(start(log, folder).train_dataset) > 0
    assert "rows: not kept for the next start" in caplog.text


def test_what_nobody_used_for_thirty_days_is_removed(log: str, folder: Path, rows: list, tmp_path: Path) -> None:
    start(log, folder)
    [old] = (folder / "tokenized_rows").iterdir()
    long_ago = time.time() - 31 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    start(write_jsonl(tmp_path / "other.jsonl", rows[:20]), folder)
    assert not old.exists()
    assert len(list((folder / "tokenized_rows").iterdir())) == 1


def test_an_entry_in_use_is_young_again(log: str, folder: Path) -> None:
    start(log, folder)
    [entry] = (folder / "tokenized_rows").iterdir()
    os.utime(entry, (0, 0))
    start(log, folder)
    assert time.time() - entry.stat().st_mtime < 60


def test_a_manifest_of_any_other_shape_is_no_more_than_a_miss(tmp_path: Path, log: str, folder: Path) -> None:
    start(log, folder)
    [entry] = (folder / "tokenized_rows").iterdir()
    good = json.loads((entry / "manifest.json").read_text())
    assert _find(entry) is not None
    row_sets = good["row_sets"]
    damaged = [
        [], "{", {}, {"row_sets": []}, {"row_sets": {"train": {}}, "summary": None}, {"row_sets": row_sets},
        {"row_sets": row_sets, "summary": 1}, {"row_sets": row_sets, "summary": {"rows": 1}},
        {"row_sets": {"../train": row_sets["train"]}, "summary": None},
        {"row_sets": {"train": {**row_sets["train"], "counts": []}}, "summary": None},
        {"row_sets": {"validation": row_sets["train"]}, "summary": None},
    ]  # fmt: skip
    for manifest in damaged:
        (entry / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
        assert _find(entry) is None, manifest


def test_what_lies_beside_the_entries_is_never_removed(log: str, folder: Path, rows: list, tmp_path: Path) -> None:
    foreign = folder / "tokenized_rows" / "mine"
    unfinished = folder / "tokenized_rows" / ".draft-of-a-killed-start"
    for path in (foreign, unfinished):
        path.mkdir(parents=True)
        os.utime(path, (0, 0))
    start(log, folder)
    assert foreign.exists()
    assert not unfinished.exists()


def test_an_entry_that_others_can_write_is_not_taken(log: str, folder: Path, caplog: Any) -> None:
    start(log, folder)
    [entry] = (folder / "tokenized_rows").iterdir()
    entry.chmod(0o755)
    start(log, folder)
    assert not was_found(caplog)


def test_a_link_is_not_taken(log: str, folder: Path, tmp_path: Path, caplog: Any) -> None:
    start(log, folder)
    [entry] = (folder / "tokenized_rows").iterdir()
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    start(log, folder)
    assert not was_found(caplog)


def test_a_full_disk_costs_the_cache_and_no_more(
    log: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bco_lightning.data.row_cache._write_manifest", full)
    assert len(start(log, folder).train_dataset) > 0
    assert "rows: not kept for the next start (No space left on device" in caplog.text
    assert not list((folder / "tokenized_rows").iterdir())


def test_other_columns_ratings_and_formats_are_not_taken(tmp_path: Path, folder: Path, caplog: Any) -> None:
    rows = [{"prompt": "p", "q": f"q{n}", "completion": "a", "label": n % 2, "stars": 3 * (n % 2)} for n in range(9)]
    log = write_jsonl(tmp_path / "x.jsonl", rows)
    start(log, folder)
    for change in (
        {"columns": Columns(prompt="q")}, {"rating": Rating("stars", up=2, down=1)},
        {"rating": Rating("stars", up=3, down=1)}, {"format": "unpaired"}, {"max_bad_rows": 0.5},
        {"train_files": [Source(log, name="n")]},
    ):  # fmt: skip
        start(**{"log": log, "folder": folder, **change})
        assert not was_found(caplog), change


def test_another_template_for_tools_is_not_taken(log: str, folder: Path, caplog: Any) -> None:
    for text in ("one", "two"):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": text}
        start(log, folder, tokenizer=tokenizer)
        assert not was_found(caplog)
