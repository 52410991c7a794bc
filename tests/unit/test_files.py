"""Names become files: globs, folders, URLs and packages; what cannot be read is named, secrets are not."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from bco_lightning.data.files import content_key, expand, open_file, open_unpacked, size_of, suffixes_of
from bco_lightning.data.records import RecordStore, seekable_files
from bco_lightning.data.remote import public_name
from bco_lightning.errors import ConfigError, FeedbackRowError
from tests.unit.made_rows import records_of

SECRET = "c0ffee"
# What `zstd --check` makes of {"a": 1}; pyarrow writes no checksum.
ZSTD_WITH_CHECKSUM = bytes.fromhex("28b52ffd04584900007b2261223a20317d0a3387dfc3")


def write(path: Path, content: bytes = b'{"a": 1}\n') -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


class Handler(SimpleHTTPRequestHandler):
    """Python's own, which knows no byte ranges; it counts requests and breaks off what is called so."""

    requests: list[str]

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if "broken" not in self.path:
            super().do_GET()
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])

    def send_head(self) -> Any:
        if "forbidden" in self.path:
            self.send_error(403)
            return None
        return super().send_head()


class RangeHandler(Handler):
    """The same with byte ranges, as object stores have them."""

    def do_GET(self) -> None:
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not last:
            super().do_GET()
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        part = content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture(params=[Handler])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an HTTP server of the test's folder."""
    request.param.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(request.param, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "suffix"),
    [
        ("a.jsonl", ".jsonl"),
        ("a.b/A.JSONL.GZ", ".jsonl"),
        ("s3://bucket/a.tsv.zst", ".tsv"),
        ("https://host/a.csv?name=b.parquet", ".csv"),
        ("v1.0/notes", ""),
        ("a.gz", ""),
        ("a.2024-01-01.ndjson", ".ndjson"),
    ],
)
def test_the_suffix_is_that_of_the_content(path: str, suffix: str) -> None:
    assert suffixes_of(path)[0] == suffix


def test_a_glob_gives_its_files_in_order_and_neither_folders_nor_hidden_files(tmp_path: Path) -> None:
    b, a = write(tmp_path / "logs/b.csv"), write(tmp_path / "logs/a.jsonl.gz")
    deep = write(tmp_path / "logs/2026/11/c.parquet")
    write(tmp_path / "logs/.hidden.jsonl")
    assert expand(f"{tmp_path}/logs/*") == [a, b]
    assert expand(f"{tmp_path}/logs/**/*.parquet") == [deep]


def test_a_name_with_brackets_is_the_file_of_that_name(tmp_path: Path) -> None:
    path = write(tmp_path / "log[1].jsonl")
    write(tmp_path / "log1.jsonl")
    assert expand(path) == [path]


def test_the_home_folder_and_file_urls_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "a.jsonl")
    assert expand("~/a.jsonl") == expand(f"file://{path}") == expand("~/*.jsonl") == [path]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("logs/none*.jsonl", r"none\*\.jsonl: expected at least one file, found none that matches"),
        ("logs", r"logs: expected a file, found a folder\. Name its files, for instance logs/\*\.jsonl"),
        ("logs/*.txt", r"logs/notes\.txt: expected a file ending in \.jsonl.*found '\.txt'"),
        ("logs/nope.jsonl", r"nope\.jsonl: expected a feedback log, found no such file"),
        ("logs/a.parquet.gz", r"a\.parquet\.gz: expected \.parquet as it is, found it packed as \.gz"),
        ("logs/a.gz", r"found '\.gz'\."),
        ("logs/a", r"found one without a suffix\."),
        ("ftp://host/a.jsonl", r"expected a path or a URL of s3, .*, found ftp://"),
        ("zip://a.jsonl::s3://bucket/a.zip", r"found a chain of URLs"),
        ("simplecache::https://host/a.jsonl", r"found a chain of URLs"),
        ("file://a.jsonl::http://host/a", r"found a chain of URLs"),
        ("memory://nowhere/a.jsonl", r"memory://nowhere/a\.jsonl: expected a feedback log, found no such file"),
        ("memory://nowhere/*.jsonl", r"expected at least one file, found none that matches"),
    ],
)
def test_what_is_no_file_is_named(tmp_path: Path, memory: Any, source: str, message: str) -> None:
    write(tmp_path / "logs/notes.txt")
    write(tmp_path / "logs/a.parquet.gz")
    with pytest.raises(FeedbackRowError, match=message):
        list(records_of(source))


def test_a_missing_packaged_file_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="package:"):
        expand("package:bco_lightning/nope.jsonl")


@pytest.mark.parametrize(
    ("protocol", "package"),
    [("s3", "s3fs"), ("gs", "gcsfs"), ("gcs", "gcsfs"), ("az", "adlfs"), ("abfs", "adlfs"), ("abfss", "adlfs")],
)
def test_a_missing_package_of_a_protocol_is_named(monkeypatch: pytest.MonkeyPatch, protocol: str, package: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    with pytest.raises(FeedbackRowError, match=rf"{protocol}://b/a\.jsonl: .*pip install {package}"):
        expand(f"{protocol}://b/a.jsonl")


def test_a_data_set_folder_counts_as_one_file(tmp_path: Path) -> None:
    DatasetDict({"test": Dataset.from_list([{"a": 1}])}).save_to_disk(tmp_path / "data")
    assert expand(f"{tmp_path}/data@test") == [f"{tmp_path}/data@test"]
    assert size_of(f"{tmp_path}/data@test") == sum(
        file.stat().st_size for file in (tmp_path / "data/test").iterdir() if file.is_file()
    )


def test_the_content_key_of_a_file_is_the_digest_of_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    path = write(tmp_path / "a.jsonl", content)
    assert content_key(path) == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert size_of(path) == len(content)


def test_the_content_key_of_a_folder_changes_with_its_data_alone(tmp_path: Path) -> None:
    for name, value in (("one", 1), ("same", 1), ("other", 2)):
        Dataset.from_list([{"a": value}]).save_to_disk(tmp_path / name)
        (tmp_path / name / "state.json").write_text("{}")  # which holds a fingerprint of its own
    one, same, other = (content_key(str(tmp_path / name)) for name in ("one", "same", "other"))
    assert one == same != other


def test_the_content_key_of_a_remote_file_changes_with_it(memory: Any) -> None:
    memory.pipe("/logs/a.jsonl", b"1")
    before = content_key("memory://logs/a.jsonl")
    assert before == content_key("memory://logs/a.jsonl")
    memory.pipe("/logs/a.jsonl", b"2")
    assert content_key("memory://logs/a.jsonl") != before


@pytest.mark.parametrize("mark", ["ETag", "etag", "md5Hash", "Content-MD5", "content_md5", "blob_id"])
def test_the_content_key_goes_by_what_a_store_says_about_content(monkeypatch: pytest.MonkeyPatch, mark: str) -> None:
    class Store:
        def __init__(self, **told: Any) -> None:
            self.told = {"name": "a", **told}

        def info(self, path: str) -> dict[str, Any]:
            return self.told

    def key_of(**told: Any) -> str:
        monkeypatch.setattr("bco_lightning.data.files.file_system", lambda url: (Store(**told), "bucket/a.jsonl"))
        return content_key("s3://bucket/a.jsonl")

    assert key_of(size=9) == ""  # so that rows are not looked up
    told = [{"size": 9, mark: "x"}, {"size": 9, mark: "y"}, {"size": 8, mark: "y"}]
    assert len({key_of(**each) for each in told}) == 3
    assert key_of(**told[0]) == key_of(**told[0])


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
def test_packed_files_give_their_content(tmp_path: Path, suffix: str, pack: Any) -> None:
    content = b"".join(b"%d\n" % number for number in range(200_000))
    path = write(tmp_path / f"a.jsonl{suffix}", pack(content[:1000]) + pack(content[1000:]))
    with open_unpacked(path) as file:
        assert file.read() == content
    with open_file(path) as file:
        assert file.read() == Path(path).read_bytes()


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
@pytest.mark.parametrize("left", [5, 0.2, 0.5, -9, -1])
def test_a_packed_file_that_is_cut_off_is_never_a_shorter_one(
    tmp_path: Path, suffix: str, pack: Any, left: float
) -> None:
    packed = pack(b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(20_000)))
    end = int(left * len(packed)) if isinstance(left, float) else int(left)
    path = write(tmp_path / f"a.jsonl{suffix}", packed[:end])
    with pytest.raises(FeedbackRowError, match=r"a\.jsonl.*found one that is cut off"), open_unpacked(path) as file:
        file.read()


PACKED = {".gz": gzip.compress(b'{"a": 1}\n', 0), ".zst": ZSTD_WITH_CHECKSUM}


@pytest.mark.parametrize(("suffix", "packed"), PACKED.items(), ids=PACKED)
def test_a_packed_file_with_a_changed_byte_is_refused(tmp_path: Path, suffix: str, packed: bytes) -> None:
    assert b"1}" in packed  # stored as it is, so that only the checksum can tell
    good = write(tmp_path / f"good.jsonl{suffix}", packed)
    bad = write(tmp_path / f"bad.jsonl{suffix}", packed.replace(b"1}", b"2}"))
    assert [record for _, record in records_of(good, {})] == [{"a": 1}]
    with pytest.raises(FeedbackRowError, match=r"bad\.jsonl.*found damaged bytes"):
        list(records_of(bad, {}))


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_an_empty_packed_file_is_not_left_open(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.jsonl.{suffix}", b"")
    with pytest.raises(FeedbackRowError) as caught, open_unpacked(path):
        pass
    assert caught.value.where == path
    opened = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert not [
        file for file in opened if file.is_relative_to(tmp_path)
    ]  # though the error holds on to what had opened it


def test_a_folder_that_may_not_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(FeedbackRowError, match=r"a\.jsonl: .* found PermissionError\. Check its permissions"):
        expand(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(("content", "found"), [(b"", "an empty one"), (b'{"a": 1}\n', "damaged bytes")])
def test_a_file_that_only_claims_to_be_packed_is_refused(
    tmp_path: Path, suffix: str, content: bytes, found: str
) -> None:
    path = write(tmp_path / f"a.jsonl{suffix}", content)
    with pytest.raises(FeedbackRowError, match=f"expected a whole .* file, found {found}"), open_unpacked(path) as file:
        file.read()


def test_a_window_that_takes_too_much_memory_is_named(tmp_path: Path) -> None:
    content = b'{"a": 1}\n'
    block = (1 | len(content) << 3).to_bytes(3, "little") + content  # the last one, not compressed
    for exponent, allowed in ((27, True), (28, False)):
        path = write(tmp_path / "a.jsonl.zst", bytes.fromhex("28b52ffd00") + bytes([(exponent - 10) << 3]) + block)
        refused = pytest.raises(FeedbackRowError, match=r"a window of over 128 MiB \(zstd --long\)")
        with nullcontext() if allowed else refused, open_unpacked(path) as file:
            assert file.read() == content


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")  # which root never meets

    path = write(tmp_path / "a.jsonl")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FeedbackRowError, match=r"a\.jsonl: .*found PermissionError"):
        open_file(path)


def test_remote_globs_and_files_are_read(memory: Any) -> None:
    memory.pipe(
        {"/logs/b.jsonl.gz": gzip.compress(b'{"a": 2}\n'), "/logs/a.jsonl": b'{"a": 1}\n', "/logs/c/d.csv": b""}
    )
    assert list(records_of("memory://logs/*.jsonl*", {})) == [
        ("memory://logs/a.jsonl:1", {"a": 1}),
        ("memory://logs/b.jsonl.gz:1", {"a": 2}),
    ]
    assert size_of("memory://logs/a.jsonl") == 9


def test_a_remote_file_that_is_cut_off_is_named_with_its_line(memory: Any) -> None:
    memory.pipe("/a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9)[:-8])
    rows = records_of("memory://a.jsonl.gz", {})
    assert [next(rows)[1] for _ in range(9)] == [{"a": 1}] * 9
    with pytest.raises(FeedbackRowError, match=r"^memory://a\.jsonl\.gz:10: .*cut off"):
        next(rows)


def test_a_glob_keeps_the_account_of_an_azure_url(monkeypatch: pytest.MonkeyPatch) -> None:
    class Azure:
        def glob(self, pattern: str, detail: bool) -> dict[str, Any]:
            return {"logs/2026/a.jsonl": {"type": "file"}}

    monkeypatch.setattr("bco_lightning.data.files.file_system", lambda url: (Azure(), "logs/2026/*.jsonl"))
    url = "abfs://logs@account.dfs.core.windows.net/2026/"
    assert expand(f"{url}*.jsonl") == [f"{url}a.jsonl"]


def test_http_text_is_read_in_one_request_whatever_its_length(tmp_path: Path, served: str) -> None:
    lines = [b'{"a": %d, "text": "%s"}\n' % (number, b"x" * 1000) for number in range(7000)]
    write(tmp_path / "a.jsonl", b"".join(lines))  # longer than the blocks that fsspec asks for
    rows = list(records_of(f"{served}/a.jsonl?signature={SECRET}", {}))
    assert [record["a"] for _, record in rows] == list(range(7000))
    assert rows[-1][0] == f"{served}/a.jsonl:7000"
    assert Handler.requests == [f"/a.jsonl?signature={SECRET}"]


@pytest.mark.parametrize("served", [RangeHandler], indirect=True)
def test_parquet_is_read_over_http_with_byte_ranges(tmp_path: Path, served: str) -> None:
    Dataset.from_list([{"a": number} for number in range(1000)]).to_parquet(tmp_path / "a.parquet")
    assert [record["a"] for _, record in records_of(f"{served}/a.parquet", {})] == list(range(1000))


@pytest.mark.parametrize("served", [RangeHandler], indirect=True)
def test_lines_are_found_again_over_http_with_byte_ranges(tmp_path: Path, served: str) -> None:
    write(tmp_path / "a.jsonl", b"".join(b'{"a": %d}\n' % number for number in range(50_000)))
    url = f"{served}/a.jsonl"
    [file] = seekable_files(url)
    places = [place for place, _ in file]
    store = RecordStore([url], [file.mark()])
    assert [store.at(0, places[number]) for number in (49_999, 3, 20_000)] == [{"a": 49_999}, {"a": 3}, {"a": 20_000}]


def test_a_server_that_gives_whole_files_is_refused_where_parts_are_needed(tmp_path: Path, served: str) -> None:
    write(tmp_path / "a.jsonl", b'{"a": 1}\n' * 100)
    with pytest.raises(FeedbackRowError, match=r"a server that gives parts of files .*, found .*Download the file"):
        seekable_files(f"{served}/a.jsonl")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope.jsonl", "expected a feedback log, found no such file"),
        ("forbidden.jsonl", "expected a f"),
        ("broken.jsonl", "found Client"),
        ("broken.jsonl.gz", "found Client"),
    ],
)
def test_http_errors_name_the_file_and_not_what_grants_access(
    tmp_path: Path, served: str, name: str, message: str
) -> None:
    write(tmp_path / "broken.jsonl", b'{"a": 1}\n' * 100_000)
    write(tmp_path / "broken.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 100_000))
    url = served.replace("://", f"://me:{SECRET}@")
    with pytest.raises(FeedbackRowError, match=message) as caught:
        list(records_of(f"{url}/{name}?signature={SECRET}", {}))
    assert caught.value.where.startswith(f"{served}/{name}")
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(FeedbackRowError, match=r"http://127\.0\.0\.1:9/a\.jsonl: .*Check address, connection"):
        list(records_of("http://127.0.0.1:9/a.jsonl", {}))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (f"https://me:{SECRET}@host/a.jsonl?X-Amz-Signature={SECRET}#x", "https://host/a.jsonl"),
        (f"s3://bucket/a.jsonl?token={SECRET}", "s3://bucket/a.jsonl"),
        ("s3://bucket/a?.jsonl", "s3://bucket/a?.jsonl"),
        (f"s3://KEY:{SECRET}@bucket/a.jsonl", "s3://bucket/a.jsonl"),
        (f"gs://{SECRET}@bucket/a.jsonl", "gs://bucket/a.jsonl"),
        ("abfs://box@account.host/a.jsonl", "abfs://box@account.host/a.jsonl"),
        (f"abfs://me:{SECRET}@account.host/a.jsonl", "abfs://account.host/a.jsonl"),
        ("hf://datasets/owner/name@main/a.jsonl", "hf://datasets/owner/name@main/a.jsonl"),
        ("logs/a?b=c.jsonl", "logs/a?b=c.jsonl"),
    ],
)
def test_a_name_that_may_be_shown_grants_no_access(path: str, name: str) -> None:
    assert public_name(path) == name


@pytest.mark.parametrize("text", ['{"path": "a.jsonl", "weight": 2}', "[{path: a.jsonl}]", " {path: a.jsonl}"])
def test_text_that_is_a_source_in_yaml_is_no_file_name(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a file name, found text that looks like YAML\. Put .* in a list"):
        expand(text)


def test_a_glob_may_begin_with_a_bracket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert expand("[ab].jsonl") == ["a.jsonl"]
