"""A stream goes on after a restart with the rows that would have come, and takes a fixed amount of memory."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from bco_lightning.data.collate import collate
from bco_lightning.data.reading import ReadingOptions
from bco_lightning.data.sampling import StepBatchSampler
from bco_lightning.data.source import Source
from bco_lightning.data.streaming import StreamedRows
from bco_lightning.data.tokenize import LengthLimits
from tests.conftest import write_jsonl
from tests.reliability.tiny_run import byte_tokenizer, finish, start
from tests.trials import Trials

ROWS_PER_STEP, FULL_ROWS = 8, 2_000_000
OPTIONS = ReadingOptions(limits=LengthLimits(max_length=64, long_completions="drop"))


def make_logs(folder: Path) -> list[str]:
    """600 rows in three files; some are too long, which only their tokens tell."""
    rows = [
        {"prompt": f"p{n}", "completion": f"c{n} " * (40 if n % 11 == 0 else 1), "label": n % 3 > 0} for n in range(600)
    ]
    return [write_jsonl(folder / f"log{number}.jsonl", rows[number::3]) for number in range(3)]


def stream(
    paths: list[str], step: int, steps: int, *, ranks: int = 1, workers: int = 0, sample: int | None = None
) -> list[list[Any]]:
    """Row ids and tokens of each step, over all ranks, as a fresh process finds them."""
    sources = [Source(path, weight=1.5 if path.endswith("2.jsonl") else 1.0) for path in paths]
    rows = StreamedRows.read("train", sources, OPTIONS, byte_tokenizer(), sample)
    order = rows.order(ROWS_PER_STEP, balanced=False, shuffle_buffer=100)
    found: list[list[Any]] = [[] for _ in range(steps)]
    for rank in range(ranks):
        dataset = rows.dataset(byte_tokenizer(), ROWS_PER_STEP, ROWS_PER_STEP // ranks, False, 100)
        done = 0
        while done < steps:
            sampler = StepBatchSampler(
                order,
                batch_size=ROWS_PER_STEP // ranks,
                accumulation=1,
                rank=rank,
                world_size=ranks,
                current_step=lambda now=step + done: now,
            )
            for batch in DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers):
                if done < steps:
                    found[done] += [batch.row_ids_B.tolist(), batch.input_ids_S.tolist()]
                done += 1
    return found


@pytest.mark.parametrize("sample", [None, 50])
def test_a_fresh_process_goes_on_within_an_epoch_with_the_rows_that_would_have_come(
    sample: int | None, tmp_path: Path
) -> None:
    paths = make_logs(tmp_path)
    whole = stream(paths, 0, 130, sample=sample)  # an epoch has 88 steps
    for case, (step, workers) in enumerate([(37, 0), (88, 2), (101, 2)]):
        folder = tmp_path / str(case)
        process = start(_resumed, paths, step, 130 - step, workers, sample, folder=folder)
        [resumed] = finish(process, folder)
        assert resumed == whole[step:]


def _resumed(paths: list[str], step: int, steps: int, workers: int, sample: int | None) -> list[list[Any]]:
    return stream(paths, step, steps, workers=workers, sample=sample)


def test_ranks_share_the_rows_of_each_step(tmp_path: Path) -> None:
    paths = make_logs(tmp_path)
    alone, together = stream(paths, 3, 95), stream(paths, 3, 95, ranks=2)
    for one, two in zip(alone, together, strict=True):
        assert one[0] == two[0] + two[2]
        assert one[1] == two[1] + two[3]


def write_large_logs(folder: Path, num_rows: int) -> str:
    """Four files with rows of about 120 bytes."""
    for number in range(4):
        with (folder / f"large{number}.jsonl").open("w", encoding="utf-8") as file:
            for row in range(num_rows // 4):
                text = f"{number}.{row} the quick brown fox jumps over a lazy dog"
                file.write(json.dumps({"prompt": text, "completion": f"and {text}", "label": row % 3 > 0}) + "\n")
    return str(folder / "large*.jsonl")


def measured(small: str, large: str, sample: int | None) -> float:
    """By how many MB memory peaks in the index pass and 50 steps, mapped files left out."""
    stream([small], 0, 2, sample=sample)  # what the first use loads is no matter of the log's size
    before, peak, ended = _anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peak.append(max(peak.pop(), _anonymous()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    rows = StreamedRows.read("train", [Source(large)], ReadingOptions(), byte_tokenizer(), sample, processes=1)
    order = rows.order(64, balanced=sample is None, shuffle_buffer=10_000)
    dataset = rows.dataset(byte_tokenizer(), 64, 64, sample is None, 10_000)
    for step in range(50):
        dataset.__getitems__(order.rows_of_step(step))
    ended.set()
    watcher.join()
    return peak[0] - before


def _anonymous() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@pytest.mark.parametrize("sample", [None, 1000])
def test_memory_does_not_grow_with_the_log(sample: int | None, trials: Trials, tmp_path: Path) -> None:
    num_rows = trials.count(FULL_ROWS // 20, FULL_ROWS)
    large, [small, *_] = write_large_logs(tmp_path, num_rows), make_logs(tmp_path)
    for trial in trials([num_rows], quick=1):
        with trial:
            folder = tmp_path / "child"
            [found] = finish(start(measured, small, large, sample, folder=folder), folder, timeout=400)
            print(f"{num_rows} rows: {found:.1f} MB")
            # Even the fewer rows, as lists of tokens, would take 100; a piece of a file takes 20 while it is read.
            assert found < 60
