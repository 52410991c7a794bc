"""A log of any size is read, tokenized and trained on in a fixed amount of memory."""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing.util
import pickle
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from bco_lightning import FeedbackDataModule
from bco_lightning.errors import FeedbackRowError
from bco_lightning.models.load import load_tokenizer
from tests.conftest import REAL_MODEL
from tests.reliability.tiny_run import byte_tokenizer, finish, make_log, start
from tests.trials import Trials

FULL_ROWS, STEPS = 200_000, 50
SENTENCE = "the quick brown fox jumps over a lazy dog and then writes some code about models and tokens for all"


def write_large_log(path: Path, num_rows: int) -> str:
    """Rows of about 1.5 kB, four for each prompt."""
    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(SENTENCE.split(), k=140)) for _ in range(500)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            prompt, answer = f"{number // 4} {texts[number // 4 % 500]}", f"{number} {texts[number % 499]}"
            file.write(json.dumps({"prompt": prompt, "completion": answer, "label": number % 3 != 0}) + "\n")
    return str(path)


def measured(log: str, small_log: str) -> dict[str, float]:
    """CPU seconds of the start, and by how many MB memory peaked in it and in the steps after it.

    Pages of mapped files are not counted: they are the kernel's cache, which it takes back when memory is short.
    """
    logging.disable()
    tokenizer = load_tokenizer(REAL_MODEL)
    _take_steps(small_log, tokenizer)  # what the first use loads is no matter of the log's size
    before, peak, ended = _megabytes("RssAnon"), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            peak.append(max(peak.pop(), _megabytes("RssAnon")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = _take_steps(log, tokenizer)
    ended.set()
    watcher.join()
    return {"seconds": round(seconds, 1), "megabytes": round(peak[0] - before, 1)}


def _take_steps(log: str, tokenizer: Any) -> float:
    started = time.process_time()
    module = FeedbackDataModule(log, tokenizer=tokenizer, max_length=1024)
    module.setup("fit")
    seconds = time.process_time() - started
    batches = iter(module.train_dataloader())
    for _ in range(STEPS):
        assert len(next(batches)) == 8
    return seconds


def _megabytes(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


@pytest.mark.promise("R22", "300 MB of feedback start in 150 MB of memory and 3 minutes of CPU time")
def test_memory_does_not_grow_with_the_log(trials: Trials, tmp_path: Path) -> None:
    num_rows = trials.count(FULL_ROWS // 12, FULL_ROWS)
    log, small_log = write_large_log(tmp_path / "log.jsonl", num_rows), make_log(tmp_path / "small.jsonl", 600)
    for trial in trials([num_rows], quick=1):
        with trial:
            processes = start(measured, log, small_log, folder=tmp_path / "child")
            [found] = finish(processes, tmp_path / "child", timeout=400)
            print(f"{num_rows} rows, {Path(log).stat().st_size / 1e6:.0f} MB: {found}")
            # A twelfth of the rows, held as objects, would take more than that beside what reading takes.
            assert found["megabytes"] < 150, found
            assert found["seconds"] < 180, found


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    multiprocessing.util.get_temp_dir()  # its own for the whole process, where it has sockets
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    module = FeedbackDataModule(make_log(tmp_path / "log.jsonl"), tokenizer=byte_tokenizer(), cache_rows=False)
    module.setup("fit")
    assert [oct(folder.stat().st_mode) for folder in scratch.iterdir()] == ["0o40700"]  # for its owner alone
    assert list(pickle.loads(pickle.dumps(module.train_dataset))) == list(module.train_dataset)  # noqa: S301
    del module
    gc.collect()
    assert not list(scratch.iterdir())
    (tmp_path / "bad.jsonl").write_text("no JSON")
    with pytest.raises(FeedbackRowError, match=r"bad\.jsonl:1"):
        FeedbackDataModule("bad.jsonl", tokenizer=byte_tokenizer(), cache_rows=False).setup("fit")
    assert not list(scratch.iterdir())
    # What still lies there when the process ends goes with it.
    processes = start(_reads, make_log(tmp_path / "log.jsonl"), str(scratch), folder=tmp_path / "child")
    assert finish(processes, tmp_path / "child") == [1]
    assert not list(scratch.iterdir())


def _reads(log: str, scratch: str) -> int:
    tempfile.tempdir = scratch
    module = FeedbackDataModule(log, tokenizer=byte_tokenizer(), cache_rows=False)
    module.setup("fit")
    _alive.append(module)
    return len(list(Path(scratch).iterdir()))


_alive: list[FeedbackDataModule] = []


@pytest.mark.slow
def test_loader_workers_that_are_started_afresh_read_the_rows_too(tmp_path: Path) -> None:
    module = FeedbackDataModule(make_log(tmp_path / "log.jsonl"), tokenizer=byte_tokenizer(), num_workers=1)
    module.setup("fit")
    loader = module.val_dataloader()
    loader.multiprocessing_context = "spawn"
    assert sum(len(batch) for batch in loader) == len(module.validation_dataset)


def test_rows_are_those_of_a_data_set_in_memory(tmp_path: Path) -> None:
    module = FeedbackDataModule(make_log(tmp_path / "log.jsonl", 700), tokenizer=byte_tokenizer(), max_length=96)
    module.setup("fit")
    for dataset in (module.train_dataset, module.validation_dataset):
        assert isinstance(dataset, Dataset)
        assert dataset.column_names[:6] == ["row_id", "input_ids", "completion_mask", "thumbs_up", "prompt", "place"]
        assert dataset.column_names[6:] == ["source", "prompt_key", "prompt_length", "completion_length", "score"]
        assert list(dataset["row_id"]) == list(range(len(dataset)))
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
        for row in dataset:
            line = json.loads(lines[int(row["place"].rpartition(":")[2]) - 1])
            assert json.loads(row["prompt"]) == [{"role": "user", "content": line["prompt"]}]
            assert row["thumbs_up"] is line["label"]
            said = [t for t, loss in zip(row["input_ids"], row["completion_mask"], strict=True) if loss]
            assert byte_tokenizer().decode(said) == line["completion"] + "<|im_end|>"
    assert len(module.train_dataset) + len(module.validation_dataset) == 700
