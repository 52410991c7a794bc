"""Faults in words: what happened, and which knob to turn."""

from __future__ import annotations

import errno
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bco_lightning.errors import ConfigError
from bco_lightning.faults import in_words
from tests.reliability.tiny_run import make_log, make_model, start, wait


def test_running_out_of_memory_names_the_knobs() -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ):
        fault = str(in_words(error))
        for knob in ("data.batch_size", "accumulate_grad_batches", "data.max_length", "gradient_checkpointing", "lora"):
            assert knob in fault


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission is missing"),
    ],
)
def test_a_disk_that_cannot_be_written_is_named(number: int, words: str) -> None:
    assert str(in_words(OSError(number, "x", "runs"))).startswith(f"runs: expected to use it, found that {words}.")


def test_the_first_error_of_ours_in_a_chain_is_what_is_said() -> None:
    try:
        try:
            raise ConfigError("data.train_files", "expected files, found none.")
        except ConfigError as error:
            raise RuntimeError("wrapped by a library") from error
    except RuntimeError as error:
        assert str(in_words(error)).startswith("data.train_files")


def test_an_error_that_is_nobodys_but_ours_is_not_hidden() -> None:
    assert in_words(KeyError("x")) is None
    assert in_words(RuntimeError("shapes do not match")) is None


def fit(model: str, log: str, how: str) -> None:
    from bco_lightning import cli
    from bco_lightning.data import datamodule

    original, asked = datamodule.pack_rows, [0]

    def fault(samples: Any, **options: Any) -> Any:
        asked[0] += 1
        if how == "memory" and asked[0] == 2:
            torch.empty(10**15)
        if how == "worker" and asked[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(samples, **options)

    datamodule.pack_rows = fault
    workers = "1" if how == "worker" else "0"
    options = {
        "model.name_or_path": model, "data.train_files": log, "trainer.accelerator": "cpu", "data.num_workers": workers,
        "data.validation_fraction": "0",
    }  # fmt: skip
    raise SystemExit(cli.main(["fit", *(f"--{name}={value}" for name, value in options.items())]))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("memory", "error: memory: expected the step to fit"),
        ("worker", "error: data.num_workers: expected loader workers"),
    ],
)
def test_a_run_that_meets_a_fault_says_so_without_a_traceback(how: str, words: str, tmp_path: Path) -> None:
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl", num_rows=64)
    assert wait(start(partial(fit, model, log, how), folder=tmp_path)) == [2], (tmp_path / "output.0").read_text()
    said = (tmp_path / "output.0").read_text()
    assert words in said
    assert "Traceback" not in said


def test_a_data_file_that_is_gone_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model")
    processes = start(partial(fit, model, str(tmp_path / "gone.jsonl"), "none"), folder=tmp_path)
    assert wait(processes) == [2]
    assert "gone.jsonl: expected a feedback log, found no such file" in (tmp_path / "output.0").read_text()
