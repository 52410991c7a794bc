"""A stream goes on after a restart with the rows that would have come, and takes some bytes of memory for each row."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bco_lightning import FeedbackDataModule, Source
from tests.conftest import write_jsonl
from tests.reliability.tiny_run import byte_tokenizer, finish, start
from tests.trials import Trials

ROWS_PER_STEP, FULL_ROWS = 8, 2_000_000


def make_logs(folder: Path) -> list[str]:
    """600 rows in three files; some are too long, which only their tokens tell."""
    rows = [
        {"prompt": f"p{n}", "completion": f"c{n} " * (40 if n % 11 == 0 else 1), "label": n % 3 > 0} for n in range(600)
    ]
    return [write_jsonl(folder / f"log{number}.jsonl", rows[number::3]) for number in range(3)]


def read(paths: list[str], **options: Any) -> FeedbackDataModule:
    sources = [Source(path, weight=1.5 if path.endswith("2.jsonl") else 1.0) for path in paths]
    defaults = {"max_length": 64, "long_completions": "drop", "streaming": True, "shuffle_buffer": 100}
    module = FeedbackDataModule(sources, tokenizer=byte_tokenizer(), **{**defaults, **options})
    module.setup("fit")
    return module


def stream(paths: list[str], step: int, steps: int, *, ranks: int = 1, workers: int = 0) -> list[list[Any]]:
    """Row ids and tokens of each step, over all ranks, as a fresh process finds them."""
    module = read(paths, batch_size=ROWS_PER_STEP // ranks, num_workers=workers)
    found: list[list[Any]] = [[] for _ in range(steps)]
    for rank in range(ranks):
        done = 0
        while done < steps:
            module.trainer = SimpleNamespace(
                global_rank=rank, world_size=ranks, accumulate_grad_batches=1, global_step=step + done,
                fast_dev_run=True, strategy=SimpleNamespace(root_device=torch.device("cpu")), lightning_module=None,
            )  # fmt: skip
            for batch in module.train_dataloader():
                if done < steps:
                    found[done] += [batch.row_ids_B.tolist(), batch.input_ids_S.tolist()]
                done += 1
    return found


def test_a_fresh_process_goes_on_within_an_epoch_with_the_rows_that_would_have_come(tmp_path: Path) -> None:
    paths = make_logs(tmp_path)
    whole = stream(paths, 0, 130)  # an epoch has 88 steps
    for case, (step, workers) in enumerate([(37, 0), (88, 2), (101, 2)]):
        folder = tmp_path / str(case)
        [resumed] = finish(start(_resumed, paths, step, 130 - step, workers, folder=folder), folder)
        assert resumed == whole[step:]


def _resumed(paths: list[str], step: int, steps: int, workers: int) -> list[list[Any]]:
    return stream(paths, step, steps, workers=workers)


def test_ranks_share_the_rows_of_each_step(tmp_path: Path) -> None:
    paths = make_logs(tmp_path)
    alone, together = stream(paths, 3, 95), stream(paths, 3, 95, ranks=2)
    for one, two in zip(alone, together, strict=True):
        assert one[0] == two[0] + two[2]
        assert sorted(one[1]) == sorted(two[1] + two[3])


def write_large_logs(folder: Path, num_rows: int) -> list[str]:
    """Four files with rows of about 120 bytes."""
    for number in range(4):
        with (folder / f"large{number}.jsonl").open("w", encoding="utf-8") as file:
            for row in range(num_rows // 4):
                text = f"{number}.{row} the quick brown fox jumps over a lazy dog"
                file.write(json.dumps({"prompt": text, "completion": f"and {text}", "label": row % 3 > 0}) + "\n")
    return [str(folder / "large*.jsonl")]


def measured(small: list[str], large: list[str]) -> float:
    """By how many MB memory peaks in the first pass and 50 steps, mapped files left out."""
    _take_steps(small, 2)  # what the first use loads is no matter of the log's size
    before, peak, ended = _anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peak.append(max(peak.pop(), _anonymous()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _take_steps(large, 50)
    ended.set()
    watcher.join()
    return peak[0] - before


def _take_steps(paths: list[str], steps: int) -> None:
    batches = iter(
        read(paths, max_length=512, batch_size=64, balanced_sampling=True, shuffle_buffer=10_000).train_dataloader()
    )
    for _ in range(steps):
        next(batches)


def _anonymous() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def test_memory_grows_by_some_bytes_a_row_and_no_more(trials: Trials, tmp_path: Path) -> None:
    num_rows = trials.count(FULL_ROWS // 20, FULL_ROWS)
    large, small = write_large_logs(tmp_path, num_rows), make_logs(tmp_path)
    for trial in trials([num_rows], quick=1):
        with trial:
            folder = tmp_path / "child"
            [found] = finish(start(measured, small, large, folder=folder), folder, timeout=400)
            print(f"{num_rows} rows: {found:.1f} MB")
            # As lists of tokens even the fewer rows would take 100.
            assert found < 60 + num_rows * 100 / 2**20
