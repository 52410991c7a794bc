"""Every kind of file gives records with their place; what is malformed is refused with file and line."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import math
import pickle
import random
import re
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Json, LargeList, List, Value

from bco_lightning.data.records import (
    RecordStore,
    json_document,
    json_lines,
    parquet,
    seekable_files,
    tables,
)
from bco_lightning.data.records.csv_rows import number_in
from bco_lightning.data.records.record_file import Place, SeekableFile
from bco_lightning.data.records.strict_json import MAX_LINE_BYTES
from bco_lightning.errors import FeedbackRowError
from tests.unit.made_rows import records_of

ROWS = [
    {"prompt": "Grüß Gott?", "completion": "Servus, 👋.", "label": True},
    {"prompt": 'a "quoted", word', "completion": "two\nlines", "label": False},
]
TABLE = pa.Table.from_pylist([{"prompt": f"question {number}", "label": number % 2} for number in range(2000)])


def records(source: Path | str, **cells: Any) -> list[dict[str, Any]]:
    found = []
    for _, record in records_of(str(source), cells or None):
        if isinstance(record, FeedbackRowError):
            raise record
        found.append(dict(record))
    return found


def places(source: Path | str) -> list[str]:
    return [place for place, _ in records_of(str(source))]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def write_stream(path: Path, table: pa.Table = TABLE) -> bytes:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=500)
    return path.read_bytes()


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)
    jsonl = "\n".join(json.dumps(row) for row in ROWS).encode()
    sources: list[Path | str] = [
        write(tmp_path / "a.jsonl", jsonl),
        write(tmp_path / "a.ndjson.gz", gzip.compress(jsonl)),
        write(tmp_path / "a.json", json.dumps(ROWS, indent=2).encode()),
    ]
    for separator, name in ((",", "a.csv"), ("\t", "a.tsv")):
        dataset.to_csv(tmp_path / name, sep=separator)
        sources += [tmp_path / name, write(tmp_path / f"{name}.gz", gzip.compress((tmp_path / name).read_bytes()))]
    with (
        pa.OSFile(str(tmp_path / "file.arrow"), "wb") as file,
        pa.ipc.new_file(file, dataset.features.arrow_schema) as ipc,
    ):
        ipc.write_table(dataset.data.table)
    write_stream(tmp_path / "stream.arrow", dataset.data.table)
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict(train=dataset, test=dataset.select([])).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    dataset.to_parquet(tmp_path / "folder/train.parquet")
    sources += [tmp_path / "file.arrow", tmp_path / "stream.arrow", tmp_path / "saved", f"{tmp_path}/splits@train"]
    for source in [*sources, tmp_path / "folder/train.parquet", f"hub:{tmp_path}/folder"]:
        assert records(source) == ROWS, source


def test_places_of_several_files_are_lines_of_each(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", b'{"a": 1}\n\n{"a": 2}\n')
    b = write(tmp_path / "b.csv", b"prompt,label\nx,1\n")
    pq.write_table(TABLE.slice(0, 2), tmp_path / "c.parquet")
    write(tmp_path / "d.jsonl", b"")
    c = tmp_path / "c.parquet"
    assert places(tmp_path / "*") == [f"{a}:1", f"{a}:3", f"{b}:2", f"{c}:1", f"{c}:2"]


def test_a_csv_place_is_the_last_line_of_its_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'prompt,label\n"two\nlines",1\n\nb,-1\n')
    assert places(path) == [f"{path}:3", f"{path}:5"]
    assert [record["label"] for record in records(path)] == [1, -1]


def test_windows_line_breaks_are_line_breaks(tmp_path: Path) -> None:
    assert records(write(tmp_path / "a.jsonl", b'{"a": "x"}\r\n\r\n{"a": "y"}\r\n')) == [{"a": "x"}, {"a": "y"}]
    assert records(write(tmp_path / "a.csv", b'a,b\r\nx,y\r\n"1\r\n2",z\r\n')) == [
        {"a": "x", "b": "y"},
        {"a": "1\r\n2", "b": "z"},
    ]


def test_cells_are_numbers_where_that_is_asked_and_they_look_like_it(tmp_path: Path) -> None:
    cells = [
        "4",
        "3.5",
        "-1",
        "+2",
        ".5",
        " 4 ",
        "1e1",
        "04",
        "",
        "NaN",
        "inf",
        "1e999",
        "4/5",
        "٤",
        "1_000",
        "9" * 310,
    ]
    path = write(tmp_path / "a.csv", ("rating,other\n" + "".join(f"{cell},1\n" for cell in cells)).encode())
    numbers = [4, 3.5, -1, 2, 0.5, 4, 10.0, 4]
    found = records(path, rating=number_in, missing=number_in)
    assert [record["rating"] for record in found] == numbers + cells[len(numbers) :]
    assert [type(record["rating"]) for record in found[:3]] == [int, float, int]
    assert {record["other"] for record in found} == {"1"}


@pytest.mark.parametrize(
    ("name", "head", "delimiter"),
    [
        ("a.csv", b"\xef\xbb\xbf", ","), ("a.csv", b"", ";"), ("a.csv", b"\xef\xbb\xbf", ";"), ("a.csv", b"", "\t"),
        ("a.tsv", b"", ","),
    ],
)  # fmt: skip
def test_a_csv_may_begin_with_a_mark_and_have_the_delimiter_of_any_spreadsheet(
    tmp_path: Path, name: str, head: bytes, delimiter: str
) -> None:
    others = ",;\t".replace(delimiter, "")
    rows = [["prompt", f"a{others}b", "c"], [f"said{delimiter}{others}", "x\ny", "1"], ["z", f'"{others}"', "0"]]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows(rows)
    found = records(write(tmp_path / name, head + text.getvalue().encode()))
    assert [list(record.values()) for record in found] == rows[1:]
    assert list(found[0]) == rows[0]


def test_only_the_label_of_a_csv_is_read_as_a_thumb(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"label,prompt\n1,1\n0,0\nTrue,True\nFALSE,x\nup,-1\n")
    assert [record["label"] for record in records(path)] == [1, 0, True, False, "up"]
    assert [record["prompt"] for record in records(path)] == ["1", "0", "True", "x", "-1"]
    assert [dict(record)["label"] for _, record in records_of(str(path), {})] == ["1", "0", "True", "FALSE", "up"]


def test_an_object_of_objects_is_records_with_their_key_as_id(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b'{"x": {"a": 1}, "y": {"id": 7, "a": 2}, "z": {}}\n')
    assert records(path) == [{"id": "x", "a": 1}, {"id": 7, "a": 2}, {"id": "z"}]
    assert places(path) == [f"{path}:1", f"{path}:2", f"{path}:3"]


def test_any_other_object_is_one_record(tmp_path: Path) -> None:
    assert records(write(tmp_path / "a.json", b' {"a": {"b": 1}, "label": true} ')) == [{"a": {"b": 1}, "label": True}]


def test_a_malformed_record_of_a_json_document_leaves_the_others(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.json", b'[{"a": 1}, {"a": NaN}, 3, {"a": 1, "a": 2}, {"a": 1e999}, {"a": "\\ud800"}, {}]'
    )
    found = [record for _, record in records_of(str(path), {})]
    assert (found[0], found[-1]) == ({"a": 1}, {})
    for number, (error, reason) in enumerate(
        zip(found[1:-1], ["NaN", "JSON object, found 3.", "each key once", "finite", "surrogate"], strict=True), 2
    ):
        assert isinstance(error, FeedbackRowError)
        assert error.where == f"{path}:{number}"
        assert reason in error.problem


def test_a_json_document_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_document, "MAX_DOCUMENT_BYTES", 16)
    assert records(write(tmp_path / "a.json", b'[{"a": 1234567}]')) == [{"a": 1234567}]
    with pytest.raises(FeedbackRowError, match=r"a larger one.*jsonl"):
        records(write(tmp_path / "a.json", b'[{"a": 12345678}]'))


def test_nested_and_unusual_columns_come_as_python_values(tmp_path: Path) -> None:
    moment = datetime.datetime(2026, 11, 21, 20, 15, tzinfo=datetime.timezone.utc)
    table = pa.table(
        {
            "messages": [[{"role": "user", "content": "q"}], None],
            "score": [math.nan, None],
            "category": pa.array(["up", None]).dictionary_encode(),
            "time": pa.array([moment, None], pa.timestamp("us", "UTC")),
            "precise": pa.array([1_700_000_000_000_000_001, None], pa.timestamp("ns")),
            "price": [decimal.Decimal("1.50"), None],
            "raw": [b"\xff", None],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    write_stream(tmp_path / "a.arrow", table)
    for name in ("a.parquet", "a.arrow"):
        first, second = records(tmp_path / name)
        assert first["messages"] == [{"role": "user", "content": "q"}]
        assert math.isnan(first["score"])
        assert (first["category"], first["time"], first["price"]) == ("up", moment, decimal.Decimal("1.50"))
        assert first["raw"] == b"\xff"
        assert set(second.values()) == {None}


def test_a_value_that_python_cannot_hold_is_one_malformed_row(tmp_path: Path) -> None:
    far = pa.array([0, 2**62, 1], pa.timestamp("us"))
    bad = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())
    for name, column in (("time", far), ("text", bad)):
        pq.write_table(pa.table({"x": column}), tmp_path / f"{name}.parquet")
        first, (place, error), last = records_of(f"{tmp_path}/{name}.parquet", {})
        assert not isinstance(first[1], FeedbackRowError)
        assert not isinstance(last[1], FeedbackRowError)
        assert isinstance(error, FeedbackRowError)
        assert error.where == place == f"{tmp_path}/{name}.parquet:2"


def test_a_row_of_a_table_over_the_limit_is_one_malformed_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": ["a", "b" * (MAX_LINE_BYTES + 1), "c"]}), tmp_path / "a.parquet")
    (_, first), (_, error), (_, last) = records_of(f"{tmp_path}/a.parquet", {})
    assert (first, last) == ({"x": "a"}, {"x": "c"})
    assert isinstance(error, FeedbackRowError)
    assert error.where == f"{tmp_path}/a.parquet:2"


def test_a_table_damaged_in_the_middle_names_the_row_reached(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "good.parquet", row_group_size=500)
    damaged = bytearray((tmp_path / "good.parquet").read_bytes())
    for position in range(len(damaged) // 2, len(damaged) // 2 + 400):
        damaged[position] ^= 0xA5
    found: list[Any] = []
    with pytest.raises(FeedbackRowError, match=r"a\.parquet:\d+: expected a Parquet file") as caught:
        found.extend(record for _, record in records_of(str(write(tmp_path / "a.parquet", bytes(damaged))), {}))
    assert len(found) >= 500
    assert found == TABLE.slice(0, len(found)).to_pylist()
    assert caught.value.where == f"{tmp_path}/a.parquet:{len(found) + 1}"


@pytest.mark.parametrize("end", [3, 0.3, 0.5, 0.9, -8, -1])
def test_a_stream_that_is_cut_off_is_never_a_shorter_one(tmp_path: Path, end: float) -> None:
    content = write_stream(tmp_path / "good.arrow")
    path = write(tmp_path / "a.arrow", content[: int(end * len(content)) if isinstance(end, float) else end])
    with pytest.raises(FeedbackRowError, match=r"a\.arrow.*expected an Arrow file"):
        records(path)


def test_a_stream_with_an_end_in_its_middle_is_never_a_shorter_one(tmp_path: Path) -> None:
    content = write_stream(tmp_path / "good.arrow")
    with pytest.raises(FeedbackRowError, match=r"a\.arrow:2001: .*more behind the end of the stream"):
        records(write(tmp_path / "a.arrow", content + content))


def test_a_shard_of_a_data_set_folder_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    [shard] = (tmp_path / "saved").glob("*.arrow")
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(FeedbackRowError, match=r"saved: expected a data set, .*cut off"):
        records(tmp_path / "saved")


def test_damaged_offsets_of_an_arrow_file_are_refused_before_they_are_followed(tmp_path: Path) -> None:
    content = write_stream(tmp_path / "good.arrow", pa.table({"x": ["some text"] * 4}))
    offsets = b"".join((9 * number).to_bytes(4, "little") for number in range(5))
    assert content.count(offsets) == 1
    for far in (2**30, -1):
        damaged = content.replace(offsets, offsets[:-4] + far.to_bytes(4, "little", signed=True))
        with pytest.raises(FeedbackRowError, match=r"a\.arrow: expected an Arrow file"):
            records(write(tmp_path / "a.arrow", damaged))


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    write_stream(tmp_path / "a.arrow", pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"]))
    with pytest.raises(FeedbackRowError, match="each column name once"):
        records(tmp_path / "a.arrow")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("splits", "expected one data set, found those of test, train"),
        ("splits@nope", "found those of test, train"),
        ("saved@train", "found one without splits"),
        ("broken", "could not be loaded"),
    ],
)
def test_a_data_set_folder_needs_its_split(tmp_path: Path, source: str, message: str) -> None:
    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict(train=dataset, test=dataset).save_to_disk(tmp_path / "splits")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/state.json").write_text("{}")
    with pytest.raises(FeedbackRowError, match=message):
        records(f"{tmp_path}/{source}")


def test_a_large_row_group_is_read_in_little_memory(tmp_path: Path) -> None:
    text = ["".join(map(chr, range(start % 50 + 40, start % 50 + 90))) * 40 + str(start) for start in range(40_000)]
    table = pa.table({"x": text})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=len(text), compression="none", use_dictionary=False)
    del table, text
    pa.default_memory_pool().release_unused()
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() - before for _ in records_of(f"{tmp_path}/a.parquet", {}))
    assert peak < 16 * 2**20 < (tmp_path / "a.parquet").stat().st_size / 4


def test_a_long_packed_log_is_read_in_little_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"a": "%s"}\n' % (b"x" * 1000) * 20_000, 1))
    tracemalloc.start()
    count = sum(1 for _ in records_of(str(path), {}))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (count, peak < 8 * 2**20) == (20_000, True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[\n{"a": 1},\n]', r"a\.json: .*a comma before the end, line 3"),
        ("a.json", b'[{"a": 1} {"a": 2}]', r"a\.json: .*Expecting ','"),
        ("a.json", b'{"a" 1}', r"a\.json: .*Expecting ':'"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', r"a\.json: .*more than one value, line 2\)\. .*name it \.jsonl"),
        ("a.json", b'{"a": {}, "a": {}}', r"a\.json: expected each key once"),
        ("a.json", b'{"a": 1, "a": 2}', r'a\.json:1: expected each key once, found "a" twice'),
        ("a.json", b'{"\\ud800": {}}', r"a\.json:1: .*half of a surrogate pair"),
        ("a.json", b"[" * 100_000, r"a\.json: .*nested too deeply"),
        ("a.json", '[{"a": "ü"}]'.encode("utf-16"), r"a\.json: expected UTF-8 text, found UTF-16"),
        ("a.json", b'[\n"\xe9"]', r"a\.json: expected UTF-8, found byte 0xe9 at column 2"),
        ("a.csv", b"a,b\n1,\xff\n", r"a\.csv:2: expected UTF-8"),
        ("a.csv", b"a,\xff\n1,2\n", r"a\.csv:1: expected UTF-8"),
        ("a.csv", b"a,b\nM\xfcnchen,1\n", r"a\.csv:2: .* byte 0xfc, as Windows-1252 writes 'ü'. .* in Excel, as "),
        ("a.csv", "a,b\nx,1\n".encode("utf-16"), r'a\.csv:1: expected UTF-8 text, found UTF-16. .* "CSV UTF-8"'),
        ("a.csv", b"a,b;c\n1,2\n", r"a\.csv:1: expected one kind of delimiter .* commas and semicolons\. Put names"),
        ("a.csv", b"sep=;\na;b\n", r"a\.csv:1: expected the names .* found a delimiter\. Remove this line"),
        ("a.csv", b"\n1,2\n", r"a\.csv:1: expected a header"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"a\.csv:1: expected each column name once.*in columns 1, 3"),
        ("a.csv", b"\x1f\x8b,b\n1,2\n", r"a\.csv:1: .*a gzip file"),
        ("a.csv", b'a\n"' + (b"x" * 1000 + b"\n") * 5000, r"a\.csv:\d+: expected a row of at most 4 MiB"),
        ("a.parquet", b"no parquet at all", r"a\.parquet: expected a Parquet file"),
        ("a.parquet", b"", r"a\.parquet: expected a Parquet file, found .* 0 bytes"),
        ("a.arrow", b"no arrow at all", r"a\.arrow: expected an Arrow file"),
        ("a.arrow", b"ARROW1\x00\x00 cut off", r"a\.arrow: expected an Arrow file"),
    ],
)
def test_what_is_malformed_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(FeedbackRowError, match=message):
        records(write(tmp_path / name, content))


def test_arrow_batches_are_cut_into_small_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 7)
    write_stream(tmp_path / "a.arrow")
    assert [record["prompt"] for record in records(tmp_path / "a.arrow")] == TABLE["prompt"].to_pylist()
    assert places(tmp_path / "a.arrow")[-1] == f"{tmp_path}/a.arrow:2000"


# ---- By place. ----


def seekable(source: Path | str) -> SeekableFile:
    [file] = seekable_files(str(source))
    return file


def told(outcome: Any) -> Any:
    """Errors compare by what they say."""
    return (outcome.problem, outcome.remedy) if isinstance(outcome, FeedbackRowError) else outcome


LONG = [{"number": number, "text": "x" * (number * 7919 % 4000)} for number in range(6000)]


@pytest.fixture(scope="module", params=["lines", "remote lines", "parquet", "remote parquet", "folder"])
def long_log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Records of several pieces and blocks; among lines also blank, malformed and endless ones."""
    folder = tmp_path_factory.mktemp("long")
    if request.param == "folder":
        Dataset.from_list(LONG).save_to_disk(folder / "rows")
        return str(folder / "rows")
    if "parquet" in request.param:
        path = folder / "log.parquet"
        pq.write_table(pa.Table.from_pylist(LONG), path, row_group_size=4500)
    else:
        path = folder / "log.jsonl"
        lines = [json.dumps(row).encode() + (b"\n\n" if row["number"] % 50 else b"\r\n") for row in LONG]
        lines[3000:3000] = [b'{"a": 1, "a": 2}\n', b'"' + b"y" * (MAX_LINE_BYTES + 2**19) + b'"\n', b" \t\n"]
        write(path, b"".join([*lines, b'{"last": 1}']))
    if "remote" not in request.param:
        return str(path)
    fsspec.filesystem("memory").pipe(f"/{request.param}/{path.name}", path.read_bytes())
    return f"memory://{request.param}/{path.name}"


def test_a_long_file_is_read_through(long_log: str) -> None:
    found = list(seekable(long_log))
    assert [record for _, record in found if isinstance(record, dict) and "number" in record] == LONG
    assert [place.line for place, _ in found] == sorted(place.line for place, _ in found)


def test_a_record_is_found_again_by_its_place(long_log: str) -> None:
    file = seekable(long_log)
    found = list(file)
    units = file.units(np.array([place.offset for place, _ in found])).tolist()
    assert units == sorted(units)
    assert len(set(units)) > 2
    drawn = random.Random(0).sample(list(zip(units, found, strict=True)), 600)
    drawn.sort(key=lambda one: one[0] % 3)  # several units at a time
    store = pickle.loads(pickle.dumps(RecordStore([long_log], [file.mark()], num_bytes=2**22)))  # noqa: S301 - our own
    for _, (place, record) in drawn:
        again = store.at(0, place)
        assert told(again) == told(record)
        if isinstance(again, FeedbackRowError):
            assert again.where == f"{file.name}:{place.line}"
    assert store.bytes_kept < 2**22 or "parquet" in long_log


def test_rows_that_would_fill_the_memory_are_decoded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.parquet"
    pq.write_table(pa.Table.from_pylist(LONG), log, row_group_size=4500)
    file = seekable(log)
    assert len(file.block(0).at(Place(4000, 4001))["text"]) == 4000 * 7919 % 4000  # type: ignore[index]
    monkeypatch.setattr(parquet, "_UNIT_BYTES", 2**18)
    block = file.block(0)
    assert block.num_bytes < 2**20
    assert block.at(Place(4000, 4001)) == LONG[4000]


def test_a_store_reads_a_block_once_for_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / f"{name}.jsonl", b'{"a": 1}\n' * 100) for name in "ab"]
    places = [place for place, _ in seekable(paths[0])]
    reads: list[str] = []

    def counted(path: str, start: int, stop: int) -> bytes:
        reads.append(path)
        return Path(path).read_bytes()[start:stop]

    monkeypatch.setattr(json_lines, "read_range", counted)
    store = RecordStore([str(path) for path in paths], ["", ""])
    assert {store.at(number, place)["a"] for place in places for number in (0, 1)} == {1}  # type: ignore[index]
    assert reads == [str(path) for path in paths]


@pytest.mark.parametrize("change", [b'{"a": 3}\n{"a": 2}\n', b'{"a": 1', b""])
def test_lines_that_have_changed_are_noticed(tmp_path: Path, change: bytes) -> None:
    path = write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": 2}\n')
    [(first, _), (second, _)] = seekable(path)
    write(path, change)
    with pytest.raises(FeedbackRowError, match=r"a\.jsonl: expected the records that it had when the run began"):
        RecordStore([str(path)], [""]).at(0, first)
    if len(change) == 18:
        assert RecordStore([str(path)], [""]).at(0, second) == {"a": 2}


def test_tables_that_have_changed_are_noticed(tmp_path: Path) -> None:
    log, rows = tmp_path / "a.parquet", tmp_path / "rows"
    marks = []
    for value in (1, 2):
        pq.write_table(pa.table({"a": [value] * 9}), log)
        Dataset.from_list([{"a": value}] * 9).save_to_disk(rows)
        marks.append([seekable(path).mark() for path in (log, rows)])
    for number, path in enumerate((log, rows)):
        assert RecordStore([str(path)], [marks[1][number]]).at(0, Place(3, 4)) == {"a": 2}
        with pytest.raises(FeedbackRowError, match="expected the records that it had when the run began"):
            RecordStore([str(path)], [marks[0][number]]).at(0, Place(3, 4))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.jsonl.gz", "found a packed one. Unpack it, or convert it to Parquet, which is packed inside."),
        ("a.json", "found a .json file. Convert it to JSON lines or Parquet."),
        ("a.csv", "found a .csv file. Convert it to JSON lines or Parquet."),
        ("hub:a/b@c", "found a data set of the hub. Name its Parquet files, for instance hf://datasets/a/b/**/*.par"),
    ],
)
def test_a_file_that_is_only_read_through_is_refused(tmp_path: Path, name: str, found: str) -> None:
    with pytest.raises(FeedbackRowError, match=re.escape(found)):
        seekable_files(name if ":" in name else str(write(tmp_path / name, b"")))


def test_values_of_json_are_the_same_from_every_kind_of_file(tmp_path: Path) -> None:
    said = [{"role": "user", "content": [{"type": "text", "text": "ß"}]}, {"role": "tool", "content": {"a": None}}]
    rows = [
        {
            "text": "Hello?",
            "one": said,
            "each": said,
            "inner": {"tools": said, "n": 1},
            "parts": [{"x": 1}, {"x": "a"}],
        },
        {"text": [1], "one": None, "each": None, "inner": None, "parts": []},
        {"text": None, "one": 3, "each": [], "inner": {"tools": None, "n": 2}, "parts": None},
    ]
    inner = {"tools": List(Json()), "n": Value("int64")}
    features = Features(text=Json(), one=Json(), each=LargeList(Json()), inner=inner, parts=List({"x": Json()}))
    dataset = Dataset.from_list(rows, features=features)
    dataset.to_parquet(tmp_path / "log.parquet")
    dataset.save_to_disk(str(tmp_path / "folder"))
    shutil.copy(next((tmp_path / "folder").glob("*.arrow")), tmp_path / "log.arrow")
    (tmp_path / "hub").mkdir()
    shutil.copy(tmp_path / "log.parquet", tmp_path / "hub" / "train.parquet")
    for source in (tmp_path / "log.parquet", tmp_path / "log.arrow", tmp_path / "folder", f"hub:{tmp_path}/hub@train"):
        assert records(source) == rows
    for name in ("log.parquet", "folder"):
        file = seekable(tmp_path / name)
        assert [file.block(0).at(Place(number, number + 1)) for number in range(3)] == rows


def test_what_is_no_json_in_a_column_of_json_is_one_malformed_row(tmp_path: Path) -> None:
    texts = pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1", "{", '{"a": NaN}', "[" * 100_000, "null"]))
    pq.write_table(pa.table({"a": texts}), tmp_path / "log.parquet")
    found = [outcome for _, outcome in records_of(str(tmp_path / "log.parquet"))]
    assert (found[0], found[4]) == ({"a": 1}, {"a": None})
    assert [outcome.where.rpartition(":")[2] for outcome in found[1:4]] == ["2", "3", "4"]


@pytest.mark.parametrize("names", [["up", "down"], ["down", "up"], ["True", "False"], ["bad", "good"], ["0", "1"]])
def test_a_class_means_what_its_name_says_whatever_its_number(names: list[str], tmp_path: Path) -> None:
    features = Features(prompt=Value("string"), label=ClassLabel(names=names), stars=ClassLabel(names=list("abc")))
    rows = [{"prompt": "a", "label": name, "stars": "c"} for name in (*names, None)]
    dataset = Dataset.from_list(rows, features=features)
    dataset.to_parquet(tmp_path / "log.parquet")
    dataset.save_to_disk(str(tmp_path / "folder"))
    words = [0, 1, None] if names == ["0", "1"] else [*names, None]
    for source in ("log.parquet", "folder"):
        assert [record["label"] for record in records(tmp_path / source)] == words
        assert [record["stars"] for record in records(tmp_path / source)] == [2, 2, 2]
        block = seekable(tmp_path / source).block(0)
        assert [block.at(Place(number, number + 1))["label"] for number in range(3)] == words  # type: ignore[index]


@pytest.mark.parametrize(
    "told", [b"", b"{", b"[]", b"\xff", b'{"info": 3}', b'{"info": {"features": {"a": {"names": 3}}}}']
)
def test_what_others_say_of_their_classes_breaks_nothing(told: bytes, tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({b"huggingface": told}), tmp_path / "log.parquet")
    assert records(tmp_path / "log.parquet") == [{"a": 1}]
