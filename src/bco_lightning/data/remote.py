"""Files that fsspec reaches: which protocols, by what names they may be shown, and their failures as one error."""

from __future__ import annotations

import errno
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from bco_lightning.errors import FeedbackRowError

# Protocols and the package each needs. fsspec knows many more, among them archives and chains of protocols.
_PACKAGES = {
    "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "adl": "adlfs",
    "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp", "memory": "fsspec", "file": "fsspec",
}  # fmt: skip
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(?:://|::.*://)")
GIVEN, _ROWS_OF = "bco_lightning-given-", "rows of "  # folder and name of rows that came from Python
HTTP = ("http", "https")
_WITH_CONTAINER = ("abfs", "abfss", "az")


def protocol_of(path: str) -> str:
    """The protocol of a URL in lower case; an empty text for a plain path."""
    url = _URL.match(path)
    return url[1].lower() if url else ""


def is_remote(path: str) -> bool:
    """Whether fsspec is to reach it; a plain path and a ``file://`` URL are local."""
    return protocol_of(path) not in ("", "file") or (protocol_of(path) == "file" and "::" in path)


def place_in(name: str, line: int) -> str:
    """Where a record stands in the file of a name, as :func:`public_name` gives it."""
    return f"row {line} of {name.removeprefix(_ROWS_OF)}" if name.startswith(_ROWS_OF) else f"{name}:{line}"


def public_name(path: str) -> str:
    """How a path may be shown and stored: a URL without its query and password, which may grant access.

    Example:
        >>> public_name("https://me:word@host/a.jsonl?signature=x"), public_name("logs/a?.jsonl")
        ('https://host/a.jsonl', 'logs/a?.jsonl')
    """
    if GIVEN in path:
        return f"{_ROWS_OF}{Path(path).stem}"
    protocol = protocol_of(path)
    if not protocol:
        return path
    # Where there is no query, question marks are those of a glob.
    path = re.sub(r"[?#].*" if protocol in HTTP else r"\?.*=.*", "", path)
    # What stands before the account of Azure is the container, unless a password comes with it.
    return re.sub(r"://[^/:]*:[^/]*@" if protocol in _WITH_CONTAINER else r"://[^/]*@", "://", path)


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it; an error if its protocol is not allowed or lacks its package."""
    from fsspec.core import url_to_fs

    protocol = protocol_of(url)
    if protocol not in _PACKAGES or "::" in url:
        found = "a chain of URLs" if "::" in url else f"{protocol}://"
        expected = f"expected a path or a URL of {', '.join(_PACKAGES)}, found {found}."
        raise FeedbackRowError(public_name(url), expected, "Copy the file to one of these.")
    package = _PACKAGES[protocol]
    if importlib.util.find_spec(package) is None:
        expected = f"expected the package {package} for {protocol}:// URLs, found it not installed."
        raise FeedbackRowError(public_name(url), expected, f"Install it: pip install {package}")
    with errors_named(url):
        return cast("tuple[Any, str]", url_to_fs(url))


@contextmanager
def errors_named(path: str) -> Iterator[None]:
    """Makes a FeedbackRowError of any failure to reach a file, without its text and cause: they hold the whole URL."""
    try:
        yield
    except FeedbackRowError:
        raise
    except Exception as error:
        remote, problem = is_remote(path), "expected a feedback log, found no such file."
        if not remote and not isinstance(error, OSError):
            raise
        # fsspec also says that there is no such file where a server cannot be reached at all.
        missing = isinstance(error, FileNotFoundError) or getattr(error, "errno", None) == errno.ENAMETOOLONG
        if not missing:
            status = getattr(error, "status", None)
            found = type(error).__name__ + (f" {status}" if isinstance(status, int) else "")
            problem = f"expected a file that can be read, found {found}."
        remedy = "Check address, connection and credentials." if remote else "" if missing else "Check its permissions."
        raise FeedbackRowError(public_name(path), problem, remedy) from None


def read_range(path: str, start: int, stop: int) -> bytes:
    """The bytes of a file between two places, fewer where a local one ends before; of a remote one in one request."""
    if start >= stop:
        return b""
    with errors_named(path):
        if not is_remote(path):
            with Path(path).open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        system, inside = file_system(path)
        data = bytes(system.cat_file(inside, start=start, end=stop))
        if len(data) != stop - start:
            raise _no_ranges(path, f"{len(data)} bytes instead of {stop - start}")
        return data


def require_ranges(url: str, size: int) -> None:
    """Refuses a web server that gives whole files alone, before it sends one that may be larger than memory."""
    if not size:
        raise _no_ranges(url, "an empty file, or one whose size it does not tell")
    with errors_named(url):
        system, inside = file_system(url)
        try:
            with system.open(inside, "rb", cache_type="none") as file:
                file.seek(size - 1)
                file.read(1)
        except ValueError:  # of fsspec, where a server answers with all of it
            raise _no_ranges(url, "one that gives whole files") from None


def _no_ranges(path: str, found: str) -> FeedbackRowError:
    expected = f"expected a server that gives parts of files with data.streaming, found {found}."
    return FeedbackRowError(public_name(path), expected, "Download the file, or set data.streaming: false.")
