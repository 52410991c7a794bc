"""The index of a stream finds every row of a log, and what plain reading finds."""

from __future__ import annotations

import gc
import json
import os
import pickle
import resource
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from bco_lightning.data.feedback_row import Columns
from bco_lightning.data.loading import BadRows
from bco_lightning.data.parsing import RecordParser
from bco_lightning.data.records import read_records
from bco_lightning.data.source import Rating, RowFormat, Source
from bco_lightning.data.streaming import json_lines, scanning
from bco_lightning.data.streaming.index import StreamIndex
from bco_lightning.data.streaming.json_lines import JsonLines
from bco_lightning.data.streaming.record_files import record_file
from bco_lightning.errors import ConfigError, FaultError, FeedbackRowError
from tests.conftest import write_jsonl
from tests.reliability.test_bounded_memory import open_files_in
from tests.reliability.tiny_run import finish, start

RECORDS = [{"prompt": f"p{n}", "completion": f"c{n} " * (n % 5 + 1), "label": n % 3 > 0} for n in range(700)]


def build(*paths: str, **options: Any) -> StreamIndex:
    formats = options.pop("formats", None) or [RowFormat() for _ in paths]
    return StreamIndex.build([Source(str(path)) for path in paths], formats, **options)


def places(index: StreamIndex) -> list[tuple[str, Any]]:
    """File and line, and record, of everything that the blocks hold, as a reader of the blocks finds them."""
    found = []
    for block in index.blocks:
        path = index.files[block["file"]]
        content = record_file(path).content(int(block["start"]), int(block["stop"]))
        for number in range(len(content)):
            place = f"{path}:{block['line'] + content.line(number) + 1}"
            try:
                found.append((place, content.record(number, place)))
            except FeedbackRowError as error:
                found.append((place, str(error)))
    return found


def plainly(*paths: str) -> list[tuple[str, Any]]:
    records = [item for path in paths for item in read_records(str(path), "label")]
    return [(place, str(record) if isinstance(record, FeedbackRowError) else record) for place, record in records]


def line(number: int, length: int = 0) -> bytes:
    return json.dumps({"prompt": f"p{number}", "completion": "c" * (length or 1), "label": number % 2 == 0}).encode()


LOGS = {
    "ordinary": b"\n".join(map(line, range(600))) + b"\n",
    "windows line ends": b"\r\n".join(map(line, range(300))) + b"\r\n",
    "no line end at the end": b"\n".join(map(line, range(3))),
    "blank lines": b"\n\n \t\n" + line(0) + b"\n\r\n" + line(1) + "\n\u3000\n\u00a0\n".encode() + line(2) + b"\n\n\n",
    "blank lines at the ends of blocks": b"\n".join(line(n) + b"\n" for n in range(700)),
    "indented rows": b"\n".join(b"  " + line(n) for n in range(300)),
    "a line longer than a block": line(0) + b"\n" + line(1, 400_000) + b"\n" + line(2) + b"\n",
    "a line longer than a piece": line(0) + b"\n" + line(1, 50_000) + b"\n" + line(2),
    "line separators within rows": "\u2028\u0085".join(
        ['{"prompt": "a', 'b", "completion": "c", "label": true}']
    ).encode(),
    "one row": line(0),
}


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("piece_bytes", [37, 64, 997, 4 * 2**20])
def test_blocks_have_the_rows_that_plain_reading_has(
    name: str, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if piece_bytes < 100 and len(LOGS[name]) > 40_000:
        pytest.skip("thousands of pieces say no more")
    monkeypatch.setattr(json_lines, "PIECE_BYTES", piece_bytes)
    path = tmp_path / "log.jsonl"
    path.write_bytes(LOGS[name])
    index = build(path, processes=1)
    assert places(index) == plainly(path)
    assert index.num_rows == index.counts.read == len(plainly(path))
    assert index.blocks["rows"].max() <= 256
    lengths = index.blocks["stop"] - index.blocks["start"]
    assert ((lengths <= 2**18) | (index.blocks["rows"] == 1)).all()
    parser = RecordParser(RowFormat())
    labels = [[parser.rated(c).thumbs_up for c in parser.candidates(r, p)] for p, r in plainly(path)]
    assert [[flag == scanning.UP] for flag in index.flags] == labels


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from([b"\n", b"\r\n", b" ", b"\r", line(7), b"{", "\u00a0".encode(), b"\xff", b"x"]), max_size=30
    ),
    st.integers(1, 60),
)
def test_any_text_has_the_rows_that_plain_reading_has(parts: list[bytes], piece_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "PIECE_BYTES", piece_bytes)
        path = Path(name, "log.jsonl")
        path.write_bytes(b"".join([line(0), b"\n", *parts]))
        index = build(path, processes=1, bad_rows=BadRows("skip", 1.0))
        assert places(index) == plainly(path)
        assert index.num_rows == len(plainly(path))
        assert build(path, read_rows=False).num_rows == index.num_rows


def test_a_line_over_the_limit_is_one_malformed_row(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(line(0) + b"\n" + line(1, 6_000_000) + b"\n" + line(2) + b"\n" + line(3, 9_000_000))
    index = build(path, bad_rows=BadRows("skip", 1.0))
    assert index.num_rows == 4
    assert index.flags.tolist() == [scanning.UP, scanning.UNUSABLE, scanning.UP, scanning.UNUSABLE]
    assert index.counts.malformed.places == [f"{path}:2", f"{path}:4"]
    assert places(index) == plainly(path)
    assert (index.blocks["stop"] - index.blocks["start"]).max() < 5_000_000


def test_parquet_with_several_row_groups_has_the_rows_that_plain_reading_has(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.parquet" for name in "ab"]
    pq.write_table(pa.Table.from_pylist(RECORDS), paths[0], row_group_size=301)
    pq.write_table(pa.Table.from_pylist(RECORDS[:10]), paths[1])
    index = build(*paths)
    assert places(index) == plainly(*paths)
    assert index.num_rows == 710
    assert index.flags.tolist() == [scanning.UP if r["label"] else scanning.DOWN for r in RECORDS + RECORDS[:10]]


def test_blocks_of_a_parquet_file_can_be_read_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.Table.from_pylist(RECORDS * 4), path, row_group_size=1000)
    index, file = build(path), record_file(str(path))
    for block in np.random.default_rng(0).permutation(index.blocks).tolist() * 2:
        known = dict(zip(index.blocks.dtype.names, block, strict=True))
        content = file.content(known["start"], known["stop"])
        assert [content.record(n, "")["prompt"] for n in range(len(content))] == [
            f"p{n % 700}" for n in range(known["start"], known["stop"])
        ]


def test_an_arrow_folder_has_the_rows_that_plain_reading_has(tmp_path: Path) -> None:
    dataset = Dataset.from_list(RECORDS).filter(lambda row: row["prompt"] != "p5")
    dataset.save_to_disk(str(tmp_path / "plain"))
    DatasetDict({"train": dataset, "test": dataset.select(range(3))}).save_to_disk(str(tmp_path / "splits"))
    sources = [str(tmp_path / "plain"), f"{tmp_path / 'splits'}@test"]
    assert places(build(*sources)) == plainly(*sources)


def test_several_processes_find_what_one_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "PIECE_BYTES", 1000)
    records = [{**r, "label": None} if n in (100, 333, 600) else r for n, r in enumerate(RECORDS)]
    path = write_jsonl(tmp_path / "log.jsonl", records)
    one, two = (build(path, processes=count, bad_rows=BadRows("skip", 1.0)) for count in (1, 2))
    assert one.counts == two.counts
    assert one.counts.malformed.places == [f"{path}:{n + 1}" for n in (100, 333, 600)]
    assert one.digest == two.digest
    assert (one.blocks == two.blocks).all()
    assert (one.flags == two.flags).all()


@pytest.mark.parametrize("processes", [1, 2])
def test_labels_of_two_vocabularies_are_refused_wherever_they_meet(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "PIECE_BYTES", 1000)
    labels = [1] * 400 + [0] * 100 + [1] * 100 + [-1] + [1] * 99
    records = [{**record, "label": label} for record, label in zip(RECORDS, labels, strict=True)]
    path = write_jsonl(tmp_path / "log.jsonl", records)
    with pytest.raises(FeedbackRowError, match=rf"{path}:601: label -1 mixes two vocabularies"):
        build(path, processes=processes)
    skipped = build(path, processes=processes, bad_rows=BadRows("skip", 1.0))
    assert skipped.counts.malformed.places == [f"{path}:601"]
    assert (skipped.counts.up, skipped.counts.down) == (599, 100)


def _die(_: scanning.Job) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_of_the_pass_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scanning, "_PIECES_ALONE", 0)  # this process would be the one that dies
    monkeypatch.setattr(scanning, "scan", _die)
    with pytest.raises(FaultError, match=r"expected the processes .* to live, found one killed.*streaming_sample"):
        build(write_jsonl(tmp_path / "log.jsonl", RECORDS), processes=2)


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    records: list[Any] = [{"prompt": "p", "completion": "c", "helpfulness": n % 5} for n in range(100)]
    records[7], records[50] = {"prompt": "p"}, {"prompt": "p", "completion": "c", "helpfulness": "much"}
    path = write_jsonl(tmp_path / "log.jsonl", records)
    rule = RowFormat(rating=Rating("helpfulness", up=4, down=2))
    counts = build(path, formats=[rule], bad_rows=BadRows("skip", 1.0)).counts
    assert (counts.read, counts.up, counts.down, counts.malformed.count) == (100, 20, 58, 2)
    [left_out] = counts.left_out.values()
    assert left_out.count == 20
    assert left_out.places == [f"{path}:{n}" for n in (4, 9, 14)]
    assert counts.read == counts.up + counts.down + counts.num_left_out + counts.malformed.count
    assert counts.by_source == {path: (20, 58)}


def test_the_first_malformed_row_stops_where_none_is_to_be_skipped(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "log.jsonl", [*RECORDS[:300], {"prompt": "p"}, *RECORDS, {"prompt": 1}])
    with pytest.raises(FeedbackRowError, match=rf"{path}:301: expected a column 'completion'"):
        build(path)


def test_too_many_malformed_rows_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "log.jsonl", [*RECORDS[:98], {}, {}])
    assert build(path, bad_rows=BadRows("skip", 0.02)).counts.malformed.count == 2
    with pytest.raises(FeedbackRowError, match="found 2 of 100, the first of them at"):
        build(path, bad_rows=BadRows("skip", 0.01))


def test_pairs_have_two_rows_each(tmp_path: Path) -> None:
    pairs = [{"prompt": f"p{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(300)]
    index = build(write_jsonl(tmp_path / "pairs.jsonl", pairs))
    assert index.num_rows == 600
    assert index.flags.tolist() == [scanning.UP, scanning.DOWN] * 300
    assert (index.blocks["first_row"] % 2 == 0).all()


def test_a_malformed_pair_takes_the_numbers_of_two_rows(tmp_path: Path) -> None:
    pairs: list[Any] = [{"prompt": "p", "chosen": "good", "rejected": "bad"} for _ in range(4)]
    pairs[1] = {"prompt": "p", "chosen": "good", "rejected": 7}
    index = build(write_jsonl(tmp_path / "pairs.jsonl", pairs), bad_rows=BadRows("skip", 1.0))
    assert index.num_rows == 8
    assert index.counts.malformed.count == 1
    assert index.flags.tolist()[4:] == [scanning.UP, scanning.DOWN] * 2
    assert index.counts.read == index.counts.used + 1 == sum(flag > 0 for flag in index.flags) + 1


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("log.jsonl.gz", "Unpack it"),
        ("log.csv", "Convert it to JSON lines or Parquet"),
        ("log.json", "Convert it to JSON lines or Parquet"),
        ("log.jsonl.zst", "Unpack it"),
    ],
)
def test_files_that_cannot_be_read_from_the_middle_are_refused(name: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(FeedbackRowError, match=rf"{name}: expected a file that can be read from the middle.*{remedy}"):
        build(tmp_path / name)


def test_a_data_set_of_the_hub_is_refused_with_the_name_of_its_files() -> None:
    with pytest.raises(FeedbackRowError, match=r"Name its Parquet files, for instance hf://datasets/some/log/\*\*"):
        build("hub:some/log@train")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_source_without_rows_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(FeedbackRowError, match=r"empty\.jsonl: expected at least one row, found none"):
        build(write_jsonl(tmp_path / "log.jsonl", RECORDS), tmp_path / "empty.jsonl")


@pytest.mark.parametrize("row_groups", [0, 1])
@pytest.mark.parametrize("read_rows", [True, False])
def test_a_parquet_file_without_rows_is_refused(row_groups: int, read_rows: bool, tmp_path: Path) -> None:
    write_groups(tmp_path / "log.parquet", *[[]] * row_groups)
    with pytest.raises(FeedbackRowError, match=r"log\.parquet: expected at least one row, found none"):
        build(tmp_path / "log.parquet", read_rows=read_rows)


def test_row_groups_and_files_without_rows_are_passed_over(tmp_path: Path) -> None:
    write_groups(tmp_path / "a.parquet", [], RECORDS[:3], [], RECORDS[3:300], [])
    write_groups(tmp_path / "b.parquet", [])
    write_groups(tmp_path / "c.parquet", RECORDS[300:310])
    index = build(tmp_path / "*.parquet")
    assert [record for _, record in places(index)] == RECORDS[:310]
    assert index.num_rows == index.counts.used == 310


def write_groups(path: Path, *groups: list[Any]) -> None:
    schema = pa.Table.from_pylist(RECORDS).schema
    with pq.ParquetWriter(path, schema) as writer:
        for group in groups:
            writer.write_table(pa.Table.from_pylist(group, schema))


def test_few_bytes_of_parquet_that_say_a_long_text_again_and_again_take_little_memory(tmp_path: Path) -> None:
    answer, folder = pa.array(["a" * 20_000_000]), tmp_path / "child"
    paths = [tmp_path / f"{rows}.parquet" for rows in (256, 30_000)]
    for path in paths:
        rows = int(path.stem)
        columns = {
            "prompt": pa.array(["p"] * rows),
            "completion": pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), answer),
            "label": pa.array([True] * rows),
        }
        pq.write_table(pa.table(columns), path, compression="zstd", store_schema=False)
        assert path.stat().st_size < 3000
    [[malformed, stopped_at, growth]] = finish(start(_growth, *map(str, paths), folder=folder), folder)
    assert malformed == 256
    assert stopped_at == f"{paths[1]}:1"
    assert growth < 400


def _growth(few_rows: str, many_rows: str) -> list[Any]:
    """Malformed rows of one file, the first one of another, and by how many MB memory peaked."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    formats = [RowFormat("unpaired")]
    counts = build(few_rows, formats=formats, bad_rows=BadRows("skip", 1.0), processes=1).counts
    with pytest.raises(FeedbackRowError) as caught:
        build(many_rows, formats=formats, processes=1)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return [counts.malformed.count, caught.value.where, growth]


def damaged_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(RECORDS), sink)
    content = bytes(sink.getvalue())
    return content[:4] + b"\xff" * 40 + content[44:]


@pytest.mark.parametrize("content", [b"PAR1 and nothing else", damaged_parquet()], ids=["no footer", "a damaged page"])
def test_a_damaged_parquet_file_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "log.parquet").write_bytes(content)
    with pytest.raises(FeedbackRowError, match=r"log\.parquet: expected a Parquet file, found") as caught:
        build(tmp_path / "log.parquet")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("dataset_info.json", b"[]", "could not be loaded"),
        ("data-00000-of-00001.arrow", None, r"could not be loaded \(No such file or directory\)"),
        ("data-00000-of-00001.arrow", b"ARROW", "it may have been cut off"),
    ],
)
def test_a_damaged_arrow_folder_is_refused_as_without_streaming(
    name: str, content: bytes | None, found: str, tmp_path: Path
) -> None:
    Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "rows"))
    if content is None:
        (tmp_path / "rows" / name).unlink()
    else:
        (tmp_path / "rows" / name).write_bytes(content)
    with pytest.raises(FeedbackRowError, match=rf"rows: expected a data set.*{found}") as caught:
        build(tmp_path / "rows")
    with pytest.raises(FeedbackRowError) as plain:
        list(read_records(str(tmp_path / "rows"), None))
    assert str(caught.value) == str(plain.value)
    assert str(caught.value).isprintable()


def test_a_format_whose_records_have_any_number_of_rows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bco_lightning.data.formats import FORMATS

    monkeypatch.setattr(FORMATS["unpaired"], "rows_per_record", None)
    with pytest.raises(ConfigError, match=r"found those of unpaired .*Set data\.streaming: false"):
        build(write_jsonl(tmp_path / "log.jsonl", RECORDS), formats=[RowFormat("unpaired")])


def test_without_reading_rows_only_their_number_is_known(tmp_path: Path) -> None:
    index = build(write_jsonl(tmp_path / "log.jsonl", [*RECORDS, {}]), read_rows=False)
    assert index.num_rows == 701
    assert index.flags is None
    assert index.counts.read == 0
    assert len(index.pools(by_class=False)[0][0]) == 701
    with pytest.raises(ConfigError, match="balanced_sampling"):
        index.pools(by_class=True)


@pytest.mark.parametrize("read_rows", [True, False])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_digest_changes_with_content_and_options(suffix: str, read_rows: bool, tmp_path: Path) -> None:
    def digest(records: list[Any], **options: Any) -> str:
        path = tmp_path / f"log.{suffix}"
        if suffix == "jsonl":
            write_jsonl(path, records)
        else:
            pq.write_table(pa.Table.from_pylist(records), path)
        return build(path, read_rows=read_rows, **options).digest

    first = digest(RECORDS)
    assert digest(RECORDS) == first
    assert digest([*RECORDS[:-1], {**RECORDS[-1], "completion": "zzz"}]) != first
    assert digest(RECORDS[:-1]) != first
    other_labels = RowFormat(columns=Columns(thumbs={"true": "up", "false": "down"}))
    assert digest(RECORDS, formats=[other_labels]) != first


def test_the_digest_stays_where_files_are_moved(tmp_path: Path) -> None:
    digests = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / name / "a.parquet")
        pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / name / "b.parquet")
        write_jsonl(tmp_path / name / "c.jsonl", RECORDS)
        processes = 1 if name == "here" else 2
        paths = (tmp_path / name / "*.parquet", tmp_path / name / "c.jsonl")
        digests.append(build(*paths, processes=processes).digest)
    assert digests[0] == digests[1]


def test_another_process_of_the_node_maps_the_same_index(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "log.jsonl", [{**r, "label": int(r["label"])} for r in RECORDS])
    index = build(path)
    told = index.told()
    assert json.loads(json.dumps(told)) == json.loads(json.dumps(told, default=str))
    shared = StreamIndex.shared(told, index.sources, [RowFormat()])
    assert (shared.blocks == index.blocks).all()
    assert (shared.flags == index.flags).all()
    assert (shared.counts, shared.digest, shared.dialects) == (index.counts, index.digest, index.dialects)
    assert not shared.flags.flags.writeable
    with pytest.raises(FaultError, match="cannot see the index"):
        StreamIndex.shared({**told, "file": {**told["file"], "path": "/proc/1/fd/999"}}, index.sources, [RowFormat()])


def test_it_pickles_to_workers_without_its_flags(tmp_path: Path) -> None:
    index = build(write_jsonl(tmp_path / "log.jsonl", RECORDS * 20))
    pickled = pickle.dumps(index)
    assert len(pickled) < 4000
    assert (pickle.loads(pickled).flags == index.flags).all()  # noqa: S301


def test_the_index_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = write_jsonl(tmp_path / "log.jsonl", RECORDS)
    index = build(path)
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]
    assert open_files_in(tmp_path)
    del index
    gc.collect()
    assert not open_files_in(tmp_path)


def test_a_remote_file_is_read_by_ranges(tmp_path: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe_file("/logs/a.jsonl", LOGS["blank lines"])
    index = build("memory://logs/a.jsonl")
    assert [record["prompt"] for _, record in places(index)] == ["p0", "p1", "p2"]
    assert JsonLines("memory://logs/a.jsonl").content(5, 5 + len(line(0))).record(0, "")["prompt"] == "p0"


def test_a_file_that_became_shorter_is_read_as_it_is_now(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "log.jsonl", [{"prompt": f"q{n}", "completion": "a", "label": n > 2} for n in range(6)]
    )
    assert build(path).num_rows == 6
    Path(path).write_text(Path(path).read_text()[:-30])
    with pytest.raises(FeedbackRowError, match=r"log\.jsonl:6: expected one JSON object per line"):
        build(path)


class WholeFiles(SimpleHTTPRequestHandler):
    """What ``python -m http.server`` is; it takes no notice of byte ranges."""

    sent = 0

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        while part := source.read(2**16):
            outputfile.write(part)
            WholeFiles.sent += len(part)


class Parts(WholeFiles):
    """The same with byte ranges."""

    def do_GET(self) -> None:
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        content = Path(self.translate_path(self.path)).read_bytes()
        part = content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@contextmanager
def served(handler: type[SimpleHTTPRequestHandler], folder: Path) -> Iterator[str]:
    """The address of an HTTP server of a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_file_of_a_web_server_is_read_in_parts(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "PIECE_BYTES", 5000)
    write_jsonl(tmp_path / "log.jsonl", RECORDS)
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "log.parquet")
    with served(Parts, tmp_path) as address:
        index = build(f"{address}/log.{suffix}", processes=1)
        assert [record for _, record in places(index)] == RECORDS


@pytest.mark.parametrize("read_rows", [True, False])
def test_a_web_server_that_gives_whole_files_alone_is_refused_before_it_has_sent_one(
    read_rows: bool, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "log.jsonl", [{"prompt": "p" * 10_000, "completion": "c", "label": True}] * 3000)
    WholeFiles.sent = 0
    with served(WholeFiles, tmp_path) as address, pytest.raises(FeedbackRowError) as caught:
        build(f"{address}/log.jsonl?signature=secret", read_rows=read_rows, processes=1)
    assert str(caught.value) == (
        f"{address}/log.jsonl: expected a server that gives parts of files with data.streaming, found one that gives "
        "whole files. Download the file, or set data.streaming: false."
    )
    assert WholeFiles.sent < 20e6


def test_a_web_server_that_tells_no_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b"")
    with (
        served(Parts, tmp_path) as address,
        pytest.raises(FeedbackRowError, match=r"expected a server that gives parts .* whose size it does not tell"),
    ):
        build(f"{address}/log.jsonl")


def test_a_remote_file_of_another_length_than_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe_file("/logs/b.jsonl", LOGS["ordinary"])
    monkeypatch.setattr(
        "fsspec.implementations.memory.MemoryFileSystem.cat_file", lambda *_, **__: LOGS["ordinary"] * 2
    )
    with pytest.raises(FeedbackRowError, match=rf"found {2 * len(LOGS['ordinary'])} bytes instead of"):
        build("memory://logs/b.jsonl", processes=1)
