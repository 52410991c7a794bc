"""Malformed rows stop a run, or are left out if that was asked for: exactly those, counted, and never too many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bco_lightning import Columns, FeedbackDataModule
from bco_lightning.data.counts import Counted
from bco_lightning.errors import ConfigError, FeedbackRowError
from tests.reliability.tiny_run import byte_tokenizer
from tests.trials import Trials

ROWS = 99


def row(**changes: Any) -> bytes:
    return json.dumps({"prompt": "q", "completion": "a", "label": True, **changes}).encode()


MALFORMED: dict[str, bytes] = {
    "deep nesting": b'{"prompt": ' + b"[" * 100_000,
    "5,000-digit integer": row().replace(b"true", b"7" * 5000),
    "NaN": row().replace(b"true", b"NaN"),
    "Infinity": row().replace(b"true", b"Infinity"),
    "1e999": row().replace(b"true", b"1e999"),
    "duplicate key": row().replace(b"}", b', "prompt": "r"}'),
    "lone surrogate": row(completion="\ud800"),
    "NUL byte": row().replace(b'"a"', b'"\x00"'),
    "NUL escape": row(completion="a\x00"),
    "byte order mark": b"\xef\xbb\xbf" + row(),
    "bad UTF-8": row().replace(b'"a"', b'"\xff"'),
    "cut off": row()[:-9],
    "a list": b'["q", "a", true]',
    "no completion": b'{"prompt": "q", "label": true}',
    "null prompt": row(prompt=None),
    "blank completion": row(completion=" \n"),
    "unknown role": row(prompt=[{"role": "boss", "content": "q"}]),
    "completion of a user": row(completion=[{"role": "user", "content": "a"}]),
    "label in words": row(label="yes"),
    "rating": row(label=4),
}
POSITIONS = {"first": 0, "middle": ROWS // 2, "last": ROWS}


def write(path: Path, malformed: dict[int, bytes]) -> list[str]:
    """A log of good rows with malformed ones before the given rows; returns the places of the good ones."""
    lines: list[tuple[bytes, bool]] = []
    for number in range(ROWS + 1):
        lines += [(malformed[number], False)] if number in malformed else []
        good = row(prompt=f"q{number}", completion=f"answer {number}", label=number % 3 != 0)
        lines += [(good, True)] if number < ROWS else []
    path.write_bytes(b"".join(line + b"\n" for line, _ in lines))
    return [f"{path}:{number}" for number, (_, is_good) in enumerate(lines, 1) if is_good]


def start(path: Path, **options: Any) -> FeedbackDataModule:
    defaults = {"tokenizer": byte_tokenizer(), "max_length": 64, "validation_fraction": 0.0}
    module = FeedbackDataModule(str(path), **{**defaults, **options})
    module.setup("fit")
    return module


@pytest.mark.promise("R17", "strict: a malformed row stops the start and is named by file and line")
def test_strict_names_the_malformed_row(trials: Trials, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for trial in trials([(kind, position) for kind in MALFORMED for position in POSITIONS], quick=60):
        with trial as (kind, position):
            write(log, {POSITIONS[position]: MALFORMED[kind]})
            with pytest.raises(FeedbackRowError) as caught:
                start(log)
            assert caught.value.where == f"{log}:{POSITIONS[position] + 1}"


@pytest.mark.promise("R17", "skip: exactly the malformed rows are left out, counted and shown, on every start")
def test_skip_leaves_out_exactly_the_malformed_rows(trials: Trials, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for trial in trials([(kind, position) for kind in MALFORMED for position in POSITIONS], quick=20):
        with trial as (kind, position):
            good = write(log, {POSITIONS[position]: MALFORMED[kind]})
            bad = f"{log}:{POSITIONS[position] + 1}"
            once, again = (start(log, bad_rows="skip", max_bad_rows=0.01) for _ in range(2))
            assert list(once.train_dataset["place"]) == good
            [counts] = once.counts
            assert (counts.read, counts.used, counts.malformed) == (ROWS + 1, ROWS, Counted(1, [bad]))
            assert f"1 malformed and left out (for instance {bad})" in str(counts)
            assert once.fingerprints() == again.fingerprints()
            assert list(once.train_dataset) == list(again.train_dataset)
            assert [batch.row_ids_B.tolist() for batch in once.train_dataloader()] == [
                batch.row_ids_B.tolist() for batch in again.train_dataloader()
            ]


@pytest.mark.promise("R17", "skip: more malformed rows than their allowed share stop the start")
def test_skip_stops_above_the_share(trials: Trials, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    # (malformed rows, allowed share, whether that is too many)
    cases = [
        (1, 0.01, False), (1, 0.0099, True), (1, 0.001, True), (1, 0.0, True), (0, 0.0, False), (11, 0.1, False),
        (12, 0.1, True), (30, 1.0, False),
    ]  # fmt: skip
    for trial in trials(cases, quick=len(cases)):
        with trial as (count, share, too_many):
            kinds = list(MALFORMED.values())
            write(log, {number * 3: kinds[number % len(kinds)] for number in range(count)})
            if not too_many:
                assert (
                    start(log, bad_rows="skip", max_bad_rows=share, few_bad_rows=0).counts[0].malformed.count == count
                )
                continue
            with pytest.raises(
                FeedbackRowError, match=rf"found {count} of {ROWS + count}, the first of them at"
            ) as error:
                start(log, bad_rows="skip", max_bad_rows=share, few_bad_rows=0)
            assert f"{log}:1" in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_handful_is_left_out_of_a_small_log_and_no_more(streaming: bool, tmp_path: Path) -> None:
    log, kinds = tmp_path / "log.jsonl", [MALFORMED[kind] for kind in ("cut off", "a list", "label in words")]
    for count in (10, 11):
        write(log, {number * 3: kinds[number % 3] for number in range(count)})
        if count == 10:
            module = start(log, bad_rows="skip", streaming=streaming)
            assert module.counts[0].malformed.count == 10
            places = [row["place"] for row in module.bad_rows]
            lines = [line for line, text in enumerate(log.read_bytes().splitlines(), 1) if text in kinds]
            assert places == [f"{log}:{line}" for line in lines]
            continue
        with pytest.raises(
            FeedbackRowError, match=r"0\.10% malformed rows .* or 10 \(data\.few_bad_rows\), found 11 of 110"
        ):
            start(log, bad_rows="skip", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["null", "missing", "empty text"])
def test_a_half_rated_log_is_used_by_its_rated_half(form: str, streaming: bool, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    rows = [json.loads(row(prompt=f"q{number}", label=number % 4 > 1)) for number in range(8)]
    for each in rows[::2]:
        each["label"] = None if form == "null" else ""
        if form == "missing":
            del each["label"]
    log.write_text("".join(json.dumps(each) + "\n" for each in rows))
    [counts] = start(log, streaming=streaming).counts
    assert (counts.read, counts.up, counts.down, counts.malformed.count) == (8, 2, 2, 0)
    assert counts.left_out["no feedback"].count == 4
    with pytest.raises(FeedbackRowError, match=r"expected a column 'thumb', found 'prompt'.*by data\.columns\.label"):
        start(log, streaming=streaming, columns=Columns(label="thumb"))


def test_a_file_of_nothing_but_malformed_rows_is_refused_whatever_the_share(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"no JSON\n" * 2000)
    with pytest.raises(FeedbackRowError, match=r"expected rows to use, found none \(0 left out, 2000 malformed\)"):
        start(log, bad_rows="skip", max_bad_rows=1.0)


def test_a_malformed_row_does_not_narrow_the_label_vocabulary(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    # The first row fails in a column; only then does the source speak true/false.
    rows = [row(prompt="", label=1), row(label=True), row(label=False)]
    log.write_bytes(b"\n".join(rows))
    module = start(log, bad_rows="skip", max_bad_rows=0.5)
    assert module.train_dataset["place"] == [f"{log}:2", f"{log}:3"]


def test_a_malformed_file_is_refused_even_where_rows_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "log.parquet").write_bytes(b"PAR1 no more than that")
    (tmp_path / "log.csv").write_text('prompt,completion,label\n"a,b,1\n')
    for name in ("log.parquet", "log.csv", "missing.jsonl"):
        with pytest.raises(FeedbackRowError, match=name):
            start(tmp_path / name, bad_rows="skip", max_bad_rows=1.0)


def test_a_malformed_row_of_a_csv_is_left_out_too(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_bytes(b"prompt,completion,label\na,b,1\nc,d\ne,\xff,1\ng,h,i,j\nk,l,0\n")
    module = start(log, bad_rows="skip", max_bad_rows=0.6)
    assert module.train_dataset["place"] == [f"{log}:2", f"{log}:6"]
    assert module.counts[0].malformed.places == [f"{log}:3", f"{log}:4", f"{log}:5"]


def test_malformed_rows_to_predict_or_validate_are_left_out_too(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    good = write(log, {5: b"no JSON"})
    options = {"bad_rows": "skip", "max_bad_rows": 0.1, "tokenizer": byte_tokenizer()}
    module = FeedbackDataModule(validation_files=str(log), predict_files=str(log), **options)
    module.setup("validate")
    module.setup("predict")
    assert module.validation_dataset["place"] == module.predict_dataset["place"] == good


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_bad_rows"):
        FeedbackDataModule("log.jsonl", max_bad_rows=share)
