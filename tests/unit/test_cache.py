"""Tokenized rows are found again by the content of all that they depend on, and by nothing less."""

from __future__ import annotations

import gc
import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from bco_lightning import FeedbackDataModule
from bco_lightning.data import Columns, Source, cache, row_sets
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


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("what", ["rows are appended", "another file takes its place", "a file joins the glob"])
def test_rows_of_files_that_change_while_they_are_read_are_not_kept_under_what_the_files_held(
    what: str, streaming: bool, tmp_path: Path, folder: Path, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "logs" / "a.jsonl"
    log.parent.mkdir()
    write_jsonl(log, rows)
    fill = row_sets.RowReader._fill

    def change(self: Any, *given: Any, **more: Any) -> Any:
        if what == "a file joins the glob":
            write_jsonl(log.with_name("b.jsonl"), rows[:3])
        else:
            write_jsonl(log if what == "rows are appended" else tmp_path / "new", [*rows, *rows[:3]])
            (tmp_path / "new").replace(log) if what != "rows are appended" else None
        return fill(self, *given, **more)

    options = {"streaming": streaming, "validation_fraction": 0.0}
    monkeypatch.setattr(row_sets.RowReader, "_fill", change)
    with pytest.warns(UserWarning, match="rows: files changed while they were read"):
        assert start(f"{log.parent}/*.jsonl", folder, **options).counts[0].read == 27
    monkeypatch.setattr(row_sets.RowReader, "_fill", fill)
    log.with_name("b.jsonl").unlink(missing_ok=True)
    write_jsonl(log, rows)
    assert start(f"{log.parent}/*.jsonl", folder, **options).counts[0].read == 24


def test_what_was_printed_at_first_is_printed_again(log: str, folder: Path, caplog: Any) -> None:
    start(log, folder)
    first = caplog.text.splitlines()
    caplog.clear()
    start(log, folder)
    again = [line for line in caplog.text.splitlines() if "rows: found" not in line]
    assert [line.split(" ", 3)[-1] for line in again] == [line.split(" ", 3)[-1] for line in first]


def test_rows_read_in_another_way_are_not_taken(log: str, folder: Path, tokenizer: Any, caplog: Any) -> None:
    start(log, folder)
    two_templates = byte_tokenizer()
    two_templates.chat_template = {"default": two_templates.chat_template, "tool_use": "one"}
    for change in (
        {"max_length": 48}, {"seed": 7}, {"validation_fraction": 0.3}, {"chat_template": "plain"},
        {"conflicts": "drop"}, {"long_prompts": "keep_start"}, {"bad_rows": "skip"}, {"loss_on": "all_turns"},
        {"format": "unpaired"}, {"max_bad_rows": 0.5}, {"train_files": [Source(log, name="n")]},
        {"columns": Columns(messages="talk")}, {"tokenizer": tokenizer}, {"tokenizer": two_templates},
    ):  # fmt: skip
        start(**{"log": log, "folder": folder, **change})
        assert not was_found(caplog), change


@pytest.mark.parametrize("changed", ["version", "digest_of_code"])
def test_rows_of_other_libraries_or_code_are_not_taken(
    changed: str, log: str, folder: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(log, folder)
    monkeypatch.setattr(row_sets, changed, lambda *_: "another")
    start(log, folder)
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
    start(log, folder)  # one in use is young again
    assert time.time() - old.stat().st_mtime < 60
    os.utime(old, (long_ago, long_ago))
    start(write_jsonl(tmp_path / "other.jsonl", rows[:20]), folder)
    assert not old.exists()
    assert len(list((folder / "tokenized_rows").iterdir())) == 1


def test_a_manifest_of_any_other_shape_is_no_more_than_a_miss(log: str, folder: Path, caplog: Any) -> None:
    start(log, folder)
    [entry] = (folder / "tokenized_rows").iterdir()
    good = json.loads((entry / "manifest.json").read_text())
    values, train = good["values"], good["values"]["row_sets"]["train"]
    damaged: list[Any] = [
        [], "{", {}, {**good, "files": []}, {**good, "values": 1}, {**good, "values": {**values, "summary": 1}},
        {**good, "values": {**values, "row_sets": {"../train": train}}},
        {**good, "values": {**values, "row_sets": {"train": {**train, "counts": []}}}},
        {**good, "files": {"../manifest.json": ""}},
    ]  # fmt: skip
    for manifest in damaged:
        (entry / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
        start(log, folder)
        assert not was_found(caplog), manifest


def test_what_lies_beside_the_entries_is_never_removed(log: str, folder: Path) -> None:
    foreign = folder / "tokenized_rows" / "mine"
    unfinished = folder / "tokenized_rows" / ".draft-of-a-killed-start"
    for path in (foreign, unfinished):
        path.mkdir(parents=True)
        os.utime(path, (0, 0))
    start(log, folder)
    assert foreign.exists()
    assert not unfinished.exists()


@pytest.mark.parametrize("how", ["others can write", "a link"])
def test_an_entry_that_another_may_have_put_there_is_not_taken(
    how: str, log: str, folder: Path, tmp_path: Path, caplog: Any
) -> None:
    start(log, folder)
    [entry] = (folder / "tokenized_rows").iterdir()
    assert stat.S_IMODE(entry.stat().st_mode) == 0o700
    if how == "a link":
        entry.rename(tmp_path / "elsewhere")
        entry.symlink_to(tmp_path / "elsewhere")
    else:
        entry.chmod(0o755)
    start(log, folder)
    assert not was_found(caplog)


def test_a_full_disk_costs_the_cache_and_no_more(
    log: str, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    fill = cache._fill

    def full(entry: Path, make: Any) -> None:
        if entry.is_relative_to(folder):
            raise OSError(28, "No space left on device")
        fill(entry, make)

    monkeypatch.setattr(cache, "_fill", full)
    assert len(start(log, folder).train_dataset) > 0
    assert "rows: not kept for the next start (No space left on device" in caplog.text
    assert not list((folder / "tokenized_rows").iterdir())


@pytest.mark.parametrize("kept", [True, False])
def test_the_public_data_set_can_be_mapped_and_has_a_file_of_a_name(log: str, folder: Path, kept: bool) -> None:
    module = start(log, folder, cache_rows=kept)
    [file] = module.train_dataset.cache_files
    assert Path(file["filename"]).is_file()
    lengths = module.train_dataset.map(lambda row: {"length": len(row["input_ids"])})
    assert lengths["length"][:] == [len(row["input_ids"]) for row in module.train_dataset]
    del module
    gc.collect()
    assert Path(file["filename"]).is_file() is kept  # with the cache off, files go with the data module
