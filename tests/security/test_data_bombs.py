"""Feedback logs are hostile: a malformed line or an expensive row is refused by name, quickly and in little memory."""

from __future__ import annotations

import gzip
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bco_lightning import FeedbackDataModule
from bco_lightning.batch import FeedbackRow, LeftOut, TokenizedSample
from bco_lightning.data import bounded
from bco_lightning.data.options import DataOptions
from bco_lightning.data.records.parquet import batch_rows
from bco_lightning.data.tokenize import RowTokenizer
from bco_lightning.errors import ConfigError, FeedbackRowError, LanguageModelError
from tests.conftest import tokenized_row
from tests.reliability.tiny_run import byte_tokenizer
from tests.trials import Trials
from tests.unit.made_rows import records_of

MIB = 2**20
GOOD = b'{"prompt": "q", "completion": "a", "label": true}\n'
BAD = b'{"prompt": "q", "completion": "a", "label": false}\n'
# A gigabyte of zeros in a megabyte, as gzip members one after the other.
EMPTY_LINES = gzip.compress(b"\n" * MIB) * 300
GZIP_BOMB = gzip.compress(bytes(MIB)) * 1024

MALFORMED: dict[str, tuple[Callable[[], bytes], str]] = {
    "nesting of 100,000": (lambda: b'{"prompt": ' + b"[" * 100_000 + b"\n", "nested too deeply"),
    "100 MB without a line break": (lambda: b'{"prompt": "' + b"x" * 100_000_000, "at most 4 MiB"),
    "5,000-digit integer": (lambda: b'{"label": ' + b"7" * 5000 + b"}\n", "at most 309 digits, found one of 5000"),
    "NaN": (lambda: BAD.replace(b"false", b"NaN"), "constant NaN"),
    "Infinity": (lambda: BAD.replace(b"false", b"-Infinity"), "constant -Infinity"),
    "1e999": (lambda: BAD.replace(b"false", b"1e999"), "finite numbers"),
    "duplicate keys": (lambda: BAD.replace(b"}", b', "label": true}'), 'each key once, found "label" twice'),
    "lone surrogate": (lambda: BAD.replace(b'"a"', b'"\\ud83d!"'), "half of a surrogate pair"),
    "NUL": (lambda: BAD.replace(b'"a"', b'"a\x00"'), "NUL"),
    "byte order mark": (lambda: b"\xef\xbb\xbf" + BAD, "byte order mark"),
    "bad UTF-8": (lambda: BAD.replace(b'"a"', b'"\xe9"'), "expected UTF-8, found byte 0xe9 at column 32"),
    "UTF-16": (lambda: BAD.decode().encode("utf-16"), "found UTF-16"),
    "gzip bomb": (lambda: GZIP_BOMB, "found a gzip file"),
    "truncated last line": (lambda: b'{"prompt": "q", "completion": "he', "may have been cut off"),
}


@contextmanager
def within(seconds: float, megabytes: float | None = None) -> Iterator[None]:
    """Fails if its body takes more time of the processor, or if resident memory peaks higher above its beginning."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before, started = _kilobytes("VmRSS"), time.process_time()
    yield
    taken, grown = time.process_time() - started, (_kilobytes("VmHWM") - before) / 1024
    assert taken < seconds, f"took {taken:.1f} s"
    assert megabytes is None or grown < megabytes, f"memory grew by {grown:.0f} MB"


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def start(log: Path | str, **options: Any) -> FeedbackDataModule:
    module = FeedbackDataModule(
        str(log), **{"tokenizer": byte_tokenizer(), "max_length": 64, "validation_fraction": 0.0, **options}
    )
    module.setup("fit")
    return module


@pytest.mark.promise("S6", "each of 14 malformed lines is refused by file and line, in 1 s and 64 MB")
def test_a_malformed_line_is_refused_quickly_and_in_little_memory(trials: Trials, tmp_path: Path) -> None:
    (tmp_path / "warm.jsonl").write_bytes((GOOD + BAD) * 300)
    start(tmp_path / "warm.jsonl")  # what is loaded at the first use is not the line's doing
    cases = [(name, line) for name in MALFORMED for line in (1, 500)]
    for trial in trials(cases, quick=28):
        with trial as (name, line):
            make, reason = MALFORMED[name]
            log = tmp_path / "log.jsonl"
            log.write_bytes((GOOD + BAD) * ((line - 1) // 2) + GOOD * ((line - 1) % 2) + make())
            with within(seconds=1.0, megabytes=64), pytest.raises(FeedbackRowError, match=reason) as caught:
                start(log)
            assert caught.value.where == f"{log}:{line}"
            log.unlink()


def test_one_long_text_that_is_stored_once_does_not_fill_the_memory(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["q"], "completion": ["a"], "label": [True]}), tmp_path / "warm.parquet")
    list(records_of(str(tmp_path / "warm.parquet"), {}))
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), pa.array(["x" * 20_000_000]))
    table, log = pa.table({"prompt": texts, "label": [True] * 256}), tmp_path / "log.parquet"
    pq.write_table(table, log, compression="zstd", store_schema=False, write_statistics=False)
    del texts, table
    pa.default_memory_pool().release_unused()
    assert log.stat().st_size < 4096
    with within(seconds=10.0, megabytes=200):
        found = [str(error) for _, error in records_of(str(log), {}) if isinstance(error, FeedbackRowError)]
    assert found == [f"{log}:{row}: expected a row of at most 4 MiB, found a longer one." for row in range(1, 257)]


def test_long_texts_of_which_few_repeat_are_still_read_many_rows_at_a_time(tmp_path: Path) -> None:
    log = tmp_path / "log.parquet"
    pq.write_table(pa.table({"prompt": [f"{row} " * 1000 for row in range(2000)]}), log)
    with log.open("rb") as file:
        assert batch_rows(file, pq.ParquetFile(log).metadata.row_group(0)) >= 8


MILLIONS = 20_000_000
EMPTY = "100,000 empty lines one after the other"
SWELLS, LONG = "bytes in memory for one that is stored", "a row of at most 4 MiB, found a longer one"


def listed(values: Any) -> pa.Table:
    """One row with all values in a list."""
    lists = pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
    return pa.table({"prompt": ["q"], "completion": ["a"], "label": [True], "more": lists})


def write_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd", use_dictionary=["more"], write_statistics=False)


def write_arrow(table: pa.Table, path: Path, compression: str | None = None, *, stream: bool = True) -> None:
    kind = pa.ipc.new_stream if stream else pa.ipc.new_file
    with kind(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)


def long_text() -> pa.Table:
    return pa.table({"prompt": pa.array(["x" * 8 * MILLIONS], pa.large_string())})


def one_text_often() -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(MIB, "i1")), pa.array(["x" * MIB]))


def repeated_text() -> pa.Array:
    return pa.RunEndEncodedArray.from_arrays(pa.array([MILLIONS], pa.int32()), pa.array(["x" * 1000]))


# Kind of file, how it is written, and what is said of it: a few kilobytes that were 100 MB and more in memory.
BOMBS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "one number in a long list": (
        ".parquet",
        lambda path: write_parquet(listed(pa.array(np.zeros(MILLIONS, "i8"))), path),
        SWELLS,
    ),
    "nulls in a long list": (
        ".parquet",
        lambda path: write_parquet(listed(pa.nulls(MILLIONS, pa.int64())), path),
        SWELLS,
    ),
    "one packed text": (".parquet", lambda path: write_parquet(long_text(), path), SWELLS),
    "rows without values": (
        ".parquet",
        lambda path: write_parquet(pa.table({"prompt": pa.nulls(MILLIONS)}), path),
        SWELLS,
    ),
    "one packed text in a stream": (".arrow", lambda path: write_arrow(long_text(), path, "zstd"), SWELLS),
    "one packed text in a file": (".arrow", lambda path: write_arrow(long_text(), path, "zstd", stream=False), SWELLS),
    "batches without values": (
        ".arrow",
        lambda path: write_arrow(pa.table({"prompt": pa.nulls(MILLIONS)}), path),
        SWELLS,
    ),
    "a repeated text": (".arrow", lambda path: write_arrow(pa.table({"prompt": repeated_text()}), path), SWELLS),
    "nulls in a list of a batch": (".arrow", lambda path: write_arrow(listed(pa.nulls(MILLIONS)), path), LONG),
    "one text in a long list": (".arrow", lambda path: write_arrow(listed(one_text_often()), path), LONG),
    "line ends": (".jsonl.gz", lambda path: path.write_bytes(gzip.compress(GOOD) + EMPTY_LINES), EMPTY),
    "line ends of cells": (".csv.gz", lambda path: path.write_bytes(gzip.compress(b"prompt\n") + EMPTY_LINES), EMPTY),
}


@pytest.mark.promise("S18", "a file of kilobytes that would fill the memory or take minutes is refused by name in 2 s")
def test_a_small_file_that_swells_is_refused(trials: Trials, tmp_path: Path) -> None:
    for name, suffix in (("warm", ".parquet"), ("warm", ".arrow")):
        write = write_parquet if suffix == ".parquet" else write_arrow
        write(pa.table({"prompt": ["q"], "more": ["a"]}), tmp_path / f"{name}{suffix}")
        list(records_of(str(tmp_path / f"{name}{suffix}"), {}))
    for trial in trials(list(BOMBS), quick=8):
        with trial as name:
            suffix, write_bomb, found = BOMBS[name]
            log = tmp_path / f"{name}{suffix}"
            write_bomb(log)
            pa.default_memory_pool().release_unused()
            assert log.stat().st_size < 3 * MIB
            said = ""
            with within(seconds=2.0, megabytes=80):
                try:
                    said = "".join(str(row) for _, row in records_of(str(log), {}) if isinstance(row, FeedbackRowError))
                except FeedbackRowError as error:
                    said = str(error)
            assert found in said
            assert name in said


def test_what_is_packed_well_is_still_read(tmp_path: Path) -> None:
    rows = pa.table(
        {"prompt": [f"{n} " * 50 for n in range(3000)], "more": ["the same"] * 3000, "none": pa.nulls(3000)}
    )
    write_parquet(rows, tmp_path / "a.parquet")
    write_arrow(rows, tmp_path / "a.arrow", "zstd")
    write_arrow(rows, tmp_path / "b.arrow", "lz4", stream=False)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n" * 90_000 + GOOD))
    for name, number in (("a.parquet", 3000), ("a.arrow", 3000), ("b.arrow", 3000), ("a.jsonl.gz", 1)):
        assert sum(isinstance(row, dict) for _, row in records_of(str(tmp_path / name), {})) == number


LATER = "{% if 'later' in messages[0]['content'] %}@{% endif %}ok"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
PROGRAMS = {
    "loops in loops": LOOP,
    "a long text": "{{ 'x' * 10000000000 }}",
    "a wide text": "{{ 'x'.ljust(10000000000) }}",
    "a padded text": "{{ '%10000000000d' % 1 }}",
    "a text that doubles": "{% set n = namespace(t='x') %}{% for i in range(40) %}{% set n.t = n.t * 2 %}{% endfor %}",
    "a large number": "{{ 9 ** (9 ** 9) }}",
    "a list that doubles": "{% set n = namespace(t=[1]) %}{% for i in range(40) %}{% set n.t = n.t * 2 %}{% endfor %}",
    "loops in loops, later": LATER.replace("@", LOOP),
}


@pytest.mark.promise("S18", "a chat template without an end, or that fills the memory, ends the start in words")
def test_a_template_without_end_is_stopped(trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "_CPU_SECONDS", 1)
    monkeypatch.setattr(bounded, "_SECONDS", 2)
    (tmp_path / "log.jsonl").write_bytes(GOOD + GOOD.replace(b'"q"', b'"later"') + BAD)
    for trial in trials(list(PROGRAMS), quick=4):
        with trial as name:
            (tmp_path / "template.jinja").write_text(PROGRAMS[name])
            with within(seconds=5.0, megabytes=100), pytest.raises(LanguageModelError, match="it goes on and on"):
                start(tmp_path / "log.jsonl", chat_template=str(tmp_path / "template.jinja"))
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_template_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jinja")
    (tmp_path / "log.jsonl").write_bytes(GOOD + BAD)
    with pytest.raises(ConfigError, match="the path of a Jinja file"):
        start(tmp_path / "log.jsonl", chat_template=str(tmp_path / "pipe.jinja"))


MANY = [{"role": role, "content": "hm"} for _ in range(5_000) for role in ("user", "assistant")]
COSTLY: dict[str, tuple[Any, Any]] = {
    "1 MB word in the prompt": ("x" * MIB, "a"),
    "1 MB word in the completion": ("q", "x" * MIB),
    "word just within the limit in the prompt": ("x" * 999_000, "a"),
    "word just within the limit in the completion": ("q", "x" * 999_000),
    "10,000 turns in the prompt": (MANY, "a"),
    "10,000 turns in the completion": ("q", MANY[1:]),
    "499 turns in the completion": ("q", MANY[1:500]),
    "90,000 control tokens": ("<|im_end|>" * 90_000, "a"),
    "12,000 control tokens far apart": (f"<|im_end|>{'x' * 70}" * 12_000, "a"),
    "nesting in a message": ([{"role": "user", "content": "q", "x": json.loads("[" * 500 + "]" * 500)}], "a"),
    "empty prompt": ("", "a"),
    "empty completion": ("q", ""),
    "white space completion": ("q", " \n\t"),
    "no messages": ("q", []),
    "no room for the completion": ([{"role": "system", "content": "s " * 999}, {"role": "user", "content": "q"}], "a"),
}
POLICIES: dict[str, dict[str, Any]] = {
    "cut": {"long_prompts": "keep_end", "long_completions": "cut"},
    "keep start": {"long_prompts": "keep_start", "long_completions": "cut"},
    "drop": {"long_prompts": "drop", "long_completions": "drop"},
}
REFUSED = {name for name in COSTLY if name.startswith(("1 MB", "10,000", "empty", "white", "no messages", "nesting"))}


@pytest.mark.promise("S14", "a costly or empty row is refused, left out or cut within 3 s")
def test_a_costly_row_is_decided_quickly(trials: Trials, tmp_path: Path, tokenizer: Any) -> None:
    for trial in trials([(name, policy) for name in COSTLY for policy in POLICIES], quick=8):
        with trial as (name, policy):
            prompt, completion = COSTLY[name]
            costly = json.dumps({"prompt": prompt, "completion": completion, "label": True})
            log = tmp_path / "log.jsonl"
            log.write_bytes(GOOD + costly.encode() + b"\n" + BAD)
            try:
                with within(seconds=3.0):
                    module = start(log, tokenizer=tokenizer, **POLICIES[policy])
            except FeedbackRowError as error:
                assert error.where == f"{log}:2"
                assert name in REFUSED, str(error)
                continue
            assert name not in REFUSED
            assert module.counts[0].read == 3
            no_room = policy == "cut" and name == "no room for the completion"
            assert sum(counted.count for counted in module.counts[0].left_out.values()) == (policy == "drop" or no_room)
            for sample in module.train_dataset:
                assert len(sample["input_ids"]) <= 64
                assert any(sample["completion_mask"][1:])


# Templates that print less than they are given, which is how a completion can vanish.
TEMPLATES = {
    "the tokenizer's own": None,
    "without prompt": "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}{% endfor %}",
    "without completion": "{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}{% endfor %}",
    "without first answer": "{% for m in messages if m['content'] != 'a' %}{{ m['content'] }}{% endfor %}",
}


EOS = byte_tokenizer().eos_token_id


def spoken(sample: TokenizedSample) -> list[int]:
    """Tokens that carry loss; the first token of all, which is predicted from nothing, does not."""
    pairs = zip(sample.input_ids[1:], sample.completion_mask[1:], strict=True)
    return [token for token, carries_loss in pairs if carries_loss]


@pytest.mark.promise("S14", "no sample has a completion without a token that carries loss")
def test_no_sample_is_without_completion_tokens(trials: Trials, tmp_path: Path) -> None:
    system = [{"role": "system", "content": "be brief"}]
    talk = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "why?" * 9}]
    shapes = {
        "plain": ([], []),
        "system": (system, []),
        "several turns": ([], talk),
        "system and several turns": (system, talk),
    }
    for name, text in TEMPLATES.items():
        (tmp_path / name).write_text(text or "")
    cases = [
        (shape, name, length, policy)
        for shape in shapes
        for name in TEMPLATES
        for length in range(2, 90, 3)
        for policy in POLICIES
    ]
    decided: set[str] = set()
    for trial in trials(cases, quick=240):
        with trial as (shape, name, length, policy):
            before, inside = shapes[shape]
            prompt = [*before, {"role": "user", "content": "q" * 9}]
            row = FeedbackRow(prompt, [*inside, {"role": "assistant", "content": "x"}], True, "log.jsonl:7")
            template = str(tmp_path / name) if TEMPLATES[name] else None
            try:
                limits = DataOptions(max_length=length, chat_template=template, **POLICIES[policy])
                sample = tokenized_row(RowTokenizer(byte_tokenizer(), limits), row)
            except FeedbackRowError as error:
                decided.add("refused")
                assert error.where == "log.jsonl:7"
                assert name == "without completion"
            else:
                decided.add("left out" if isinstance(sample, LeftOut) else "kept")
                assert isinstance(sample, LeftOut) or set(spoken(sample)) - {EOS}
    assert trials.run < 960 or decided == {"refused", "left out", "kept"}
