"""Where feedback logs are: files here and in stores, packed or not, named one by one or by a glob."""

from __future__ import annotations

import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from bco_lightning.data.remote import GIVEN, HTTP, errors_named, file_system, is_remote, protocol_of, public_name
from bco_lightning.errors import ConfigError, FeedbackRowError
from bco_lightning.identity import digest_of_file, digest_of_values
from bco_lightning.places import resolve_packaged

HUB = "hub:"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
TABLES = (".parquet", ".arrow")
_KNOWN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", *TABLES)
_BLOCK, _PACKED_BLOCK = 2**20, 2**16
# What file systems say about content, in the spellings of HTTP, S3, Google, Azure, the hub and fsspec's memory.
_CONTENT_MARKS = ("ETag", "etag", "Content-MD5", "md5Hash", "content_md5", "blob_id", "created")


def expand(source: str) -> list[str]:
    """The files that a source stands for, sorted; each ends in a known suffix, or is a folder or a hub data set.

    Args:
        source: A file, a glob such as ``logs/**/*.jsonl.gz``, a URL of fsspec (with a glob, except for HTTP),
            ``package:NAME/path``, a folder written by ``save_to_disk`` (with ``@SPLIT`` if it has several), or
            ``hub:OWNER/NAME@SPLIT``, which stays as it is.
    """
    if source.strip()[:1] in ("{", "[") and source.strip()[-1:] in ("}", "]"):
        remedy = "Put sources in a list, for instance [{path: log.jsonl, weight: 2}]."
        raise ConfigError("data files", "expected a file name, found text that looks like YAML.", remedy)
    if source.startswith(HUB):
        if not source.removeprefix(HUB).partition("@")[0]:
            raise FeedbackRowError(source, "expected a data set as hub:OWNER/NAME@SPLIT, found no name.")
        return [source]
    with errors_named(source):
        files = _known(source, _matching(source)) if is_remote(source) else _expand_local(source)
    for file in files:
        name = file.encode(errors="backslashreplace").decode()
        if name != file:  # which could not be written down as the place of a row
            raise FeedbackRowError(name, "expected a name in UTF-8, found other bytes.", "Rename the file.")
    return files


def suffixes_of(path: str) -> tuple[str, str]:
    """The suffix in lower case, without the query of a URL, and that of the compression if there is one."""
    name = path if GIVEN in path else public_name(path)
    *before, last = ["", *Path(name.rsplit("/", 1)[-1].lower()).suffixes]
    return (before[-1], last) if last in COMPRESSIONS else (last, "")


def arrow_folder(path: str) -> tuple[Path, str] | None:
    """Folder and split of ``folder@SPLIT``, if ``save_to_disk`` has written it; the split may be empty."""
    before, _, after = path.rpartition("@")
    for folder, split in ((path, ""), (before, after)):
        if folder and any(Path(folder, name).is_file() for name in ("state.json", "dataset_dict.json")):
            return Path(folder), split
    return None


def files_of(path: str) -> list[Path]:
    """A local file itself, or all files of an Arrow folder."""
    folder = arrow_folder(path)
    return sorted(file for file in Path(*folder).rglob("*") if file.is_file()) if folder else [Path(path)]


def size_of(path: str) -> int:
    """Bytes of a file as it lies there, packed or not, or of all files of a folder; 0 where a server does not say."""
    with errors_named(path):
        if is_remote(path):
            return int(_info(path).get("size") or 0)
        return sum(file.stat().st_size for file in files_of(path))


def content_key(path: str) -> str:
    """A key that changes with the content of a file or of an Arrow folder.

    It is a digest of the bytes of local files, and for remote ones of what their server says about the content; an
    empty text where that is nothing, as for hub data sets.
    """
    if path.startswith(HUB):
        return ""
    with errors_named(path):
        if is_remote(path):
            info = _info(path)
            marks = {name: str(info[name]) for name in _CONTENT_MARKS if info.get(name)}
            return f"fsspec:{digest_of_values({'size': info.get('size'), **marks})}" if marks else ""
        folder, files = arrow_folder(path), files_of(path)
        if folder is None:
            return f"sha256:{_digest_of(files[0])}"
        digests = {str(file.relative_to(folder[0])): _digest_of(file) for file in files}
        return f"sha256:{digest_of_values({'split': folder[1], 'files': digests})}"


def _digest_of(file: Path) -> str:
    status = file.stat()
    return _digest(file, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@lru_cache
def _digest(file: Path, *state: int) -> str:
    return digest_of_file(file)


def open_file(path: str) -> io.BufferedReader:
    """Opens a file for reading its bytes as they are; it can seek, except for text over HTTP, read as it comes."""
    if is_remote(path):
        return io.BufferedReader(_RemoteFile(path), _BLOCK)
    with errors_named(path):
        return io.BufferedReader(Path(path).open("rb", buffering=0), _BLOCK)


@contextmanager
def open_unpacked(path: str) -> Iterator[BinaryIO]:
    """Opens a file for reading its content from the front to the end, unpacked if its name says that it is packed."""
    with open_file(path) as file:
        name, packed = public_name(path), suffixes_of(path)[1]
        if packed and not file.peek(1):  # which both libraries take for a packed file of no bytes
            raise damage(name, name, None)
        # Whatever unpacks before a damage is to be read, so that the line that is named is the one reached.
        content: Any = file
        try:
            if packed == ".gz":
                content = gzip.GzipFile(fileobj=file)
            elif packed:
                from pyarrow import CompressedInputStream

                content = io.BufferedReader(CompressedInputStream(file, "zstd"), _PACKED_BLOCK)
            with content:
                yield content
        except (EOFError, OSError, zlib.error) as error:
            raise damage(name, name, error) from None


def damage(name: str, place: str, error: Exception | None) -> FeedbackRowError:
    """The error for a file that was read up to a place; ``error`` came instead, or nothing at all."""
    compression = COMPRESSIONS.get(Path(name).suffix.lower())
    if compression is None or (isinstance(error, OSError) and error.errno):
        return FeedbackRowError(place, f"expected to read on, found {type(error).__name__}.")
    found = "damaged bytes" if error else "an empty one"
    # EOFError is gzip's; the words are those of pyarrow and zstd, which tell their errors apart by nothing else.
    if isinstance(error, EOFError) or "Truncated" in str(error):
        found = "one that is cut off"
    elif "too much memory" in str(error):
        found = "one packed with a window of over 128 MiB (zstd --long)"
    remedy = "Copy or pack it again, or rename it if it is not packed."
    return FeedbackRowError(place, f"expected a whole {compression} file, found {found}.", remedy)


class _RemoteFile(io.RawIOBase):
    """A file of fsspec whose every failure is a FeedbackRowError, as each protocol has errors of its own."""

    def __init__(self, url: str) -> None:
        # What a block of no bytes means to HTTP only: one request for all, whose answer is read as it comes.
        options = {"block_size": 0} if protocol_of(url) in HTTP and suffixes_of(url)[0] not in TABLES else {}
        with errors_named(url):
            system, inside = file_system(url)
            self._url, self._file = url, cast("BinaryIO", system.open(inside, "rb", **options))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        with errors_named(self._url):
            return self._file.seek(offset, whence)

    def readinto(self, buffer: Any, /) -> int:
        with errors_named(self._url):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._file.close()


def _expand_local(source: str) -> list[str]:
    # Path.expanduser fails where there is no such user.
    path = Path(os.path.expanduser(resolve_packaged(source.removeprefix("file://"))))  # noqa: PTH111
    if path.is_file():
        return _known(source, [str(path)])
    if arrow_folder(str(path)) is not None:
        return [str(path)]
    if path.is_dir():
        remedy = f"Name its files, for instance {path}/*.jsonl."
        raise FeedbackRowError(source, "expected a file, found a folder.", remedy)
    if glob.has_magic(str(path)):
        # Path.glob would also give hidden files, such as the checkpoints of editors.
        found = glob.iglob(str(path), recursive=True)  # noqa: PTH207
        return _known(source, (file for file in found if Path(file).is_file()))
    _known(source, [str(path)])
    raise FeedbackRowError(source, "expected a feedback log, found no such file.")


def _matching(url: str) -> list[str]:
    system, inside = file_system(url)
    if not glob.has_magic(inside) or protocol_of(url) in HTTP:
        return [url]
    found = [path.lstrip("/") for path, info in system.glob(inside, detail=True).items() if info["type"] == "file"]
    # Of abfs://container@account.host/path, file systems give back container/path, which names no account.
    scheme, _, rest = url.partition("://")
    authority = rest.partition("/")[0]
    if "@" in authority:
        found = [f"{authority}/{path.partition('/')[2]}" for path in found]
    return [f"{scheme}://{path}" for path in found]


def _known(source: str, files: Iterable[str]) -> list[str]:
    """The files in order, if there are any and each can be read."""
    found = sorted(files)
    if not found:
        raise FeedbackRowError(public_name(source), "expected at least one file, found none that matches.")
    for file in found:
        suffix, compression = suffixes_of(file)
        if suffix not in _KNOWN:
            other = repr(suffix or compression) if suffix or compression else "one without a suffix"
            expected = f"expected a file ending in {', '.join(_KNOWN)}, or hub:OWNER/NAME; found {other}."
            raise FeedbackRowError(public_name(file), expected)
        if compression and suffix in TABLES:
            expected = f"expected {suffix} as it is, found it packed as {compression}."
            raise FeedbackRowError(public_name(file), expected, "Unpack the file.")
    return found


def _info(url: str) -> Any:
    system, inside = file_system(url)
    return system.info(inside)
