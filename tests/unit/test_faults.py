"""Faults in words: what happened, and which knob to turn."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import instantiate_class

from bco_lightning.cli import faults
from bco_lightning.cli.faults import in_words
from bco_lightning.errors import ConfigError
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


def raised_by(act: Any) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        act()
    return caught.value


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: Trainer(gradient_clip_algorithm="median"), "lightning: `gradient_clip_algorithm` median is invalid."),
        (lambda: Trainer(barebones=True, logger=True, enable_model_summary=False), "lightning: `Trainer(barebones="),
        (lambda: Trainer(limit_val_batches=-1), "lightning: "),
        (lambda: Trainer(strategy="bogus", accelerator="cpu"), "lightning: You selected an invalid strategy name"),
        (lambda: Trainer(val_check_interval=1.5, accelerator="cpu"), "lightning: You have passed invalid value 1.5"),
        (lambda: Trainer(devices="many", accelerator="cpu"), "lightning: `devices` selected with `CPUAccelerator`"),
        (lambda: Trainer(accelerator="cpu", devices=0), "lightning: `Trainer(devices=0)` value is not a valid input"),
        (lambda: EarlyStopping("x").load_state_dict({}), None),  # a KeyError that nobody raises on purpose
        (lambda: ArgumentParser().get_defaults().nothing, None),
        (lambda: torch.distributed.init_process_group("gloo", rank=0), "torch.distributed: "),
        (lambda: instantiate_class((), {"class_path": "no.such.Class"}), None),
    ],
)
def test_what_a_library_refuses_on_purpose_passes_through_in_one_line_and_accidents_do_not(
    act: Any, words: str | None
) -> None:
    found = in_words(raised_by(act))
    assert (found is None) == (words is None)
    assert words is None or str(found).startswith(words)
    assert "\n" not in str(found)


def fit(model: str, log: str, how: str) -> None:
    from bco_lightning.cli import app as cli
    from bco_lightning.data import datamodule

    original, asked = datamodule.collate_cut, [0]

    def fault(samples: Any, **options: Any) -> Any:
        asked[0] += 1
        if how == "memory" and asked[0] == 2:
            torch.empty(10**15)
        if how == "worker" and asked[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(samples, **options)

    datamodule.collate_cut = fault
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


GLOO = "[/w/gloo/transport/tcp/unbound_buffer.cc:129] "


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            GLOO + "Timed out waiting 5000ms for send operation to complete",
            "gone or hangs: none in 5 s (process_timeout)",
        ),
        ("wait timeout after 600000ms, keys: /default_pg/0", "gone or hangs: none in 600 s (process_timeout)"),
        (
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE, NumelIn=1, "
            "NumelOut=1, Timeout(ms)=600000) ran for 600011 milliseconds before timing out.",
            "gone or hangs: none in 600 s (process_timeout)",
        ),
        ("Application timeout caused pair closure", "gone or hangs: none in process_timeout."),
        (
            "Timed out after 6 seconds waiting for clients. 1/2 clients joined.",
            "expected 2 processes to start, found 1 after 6 s (process_timeout)",
        ),
        (GLOO + "Connection closed by peer [10.0.0.1]:503", "gone or hangs (Connection closed by peer [10.0.0.1]:503)"),
        (
            "The sizes `data_parallel_size=3` ... multiplied should equal the world size (2).",
            "trainer.devices: expected",
        ),
    ],
)
def test_what_libraries_say_of_other_processes_is_told_in_words(text: str, words: str) -> None:
    assert words in str(in_words(RuntimeError(text)))


def child(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def test_a_process_that_outlives_the_first_one_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_OUTLIVE", 0.2)
    hangs, ends = child("import time; time.sleep(100)"), child("")
    over = threading.Event()
    faults._end_with_this_one([hangs, ends], over)
    assert over.is_set()
    assert [hangs.wait(10), ends.wait(10)] in ([-signal.SIGKILL, 0], [-signal.SIGKILL, -signal.SIGKILL])


@pytest.mark.parametrize(
    ("code", "words"),
    [("raise SystemExit(3)", "ended with status 3"), ("import os; os.abort()", "was ended by SIGABRT")],
)
def test_the_first_process_does_not_wait_for_ever_for_one_that_has_failed(
    code: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(faults, "_LAST_WORDS", 0.1)
    monkeypatch.setattr(faults.os, "_exit", statuses.append)
    hangs, fails = child("import time; time.sleep(100)"), child(code)
    faults._watch([hangs, fails], threading.Event())
    assert statuses == [2]
    assert hangs.wait(10) == -signal.SIGKILL
    assert f"error: processes: expected process 2 to live, found that it {words}" in capsys.readouterr().err


def test_the_first_process_has_the_last_word_if_it_fails_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults.os, "_exit", lambda status: pytest.fail("it must end by itself"))
    over = threading.Event()
    threading.Timer(0.3, over.set).start()
    faults._watch([child("raise SystemExit(3)")], over)


def test_nothing_is_watched_once_all_have_ended_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults.os, "_exit", lambda status: pytest.fail("nothing has failed"))
    over = threading.Event()
    threading.Timer(1, over.set).start()
    faults._watch([child("")], over)
