"""Files that gzip or zstd have packed, read as they unpack; what is truncated or damaged is noticed."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import Any, BinaryIO

from bco_lightning.data.remote import public_name
from bco_lightning.errors import FeedbackRowError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BLOCK = 2**16


class UnpackedFile(io.RawIOBase):
    """The content of a packed file.

    Args:
        file: The packed bytes; closed with this file.
        path: Where they are from, for messages.
        suffix: ``.gz`` or ``.zst``.
    """

    def __init__(self, file: io.BufferedReader, path: str, suffix: str) -> None:
        self._file, self._path, self._compression = file, path, COMPRESSIONS[suffix]
        self._stream = _gzip_stream(file) if suffix == ".gz" else _zstd_stream(file)
        # Whatever unpacks before the damage is to be read, so that the line that is named is the one reached.
        self._read = self._stream.read1 if suffix == ".gz" else self._stream.read
        if not file.peek(1):
            # Both libraries take this for a packed file of no bytes.
            self.close()
            raise self._broken("an empty one")

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Reads as many bytes as fit, or fewer.

        Raises:
            FeedbackRowError: If the file is truncated or damaged here.
        """
        try:
            content = self._read(min(len(buffer), _BLOCK))
        except (EOFError, OSError, zlib.error) as error:
            raise self._broken(_found(error)) from None
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        """Closes the packed file too."""
        if not self.closed:
            super().close()
            self._stream.close()
            self._file.close()

    def _broken(self, found: str) -> FeedbackRowError:
        return FeedbackRowError(
            public_name(self._path),
            f"expected a whole {self._compression} file, found {found}.",
            "Copy or pack it again, or rename it if it is not packed.",
        )


def _found(error: Exception) -> str:
    # EOFError is gzip's; the words are those of pyarrow and zstd, which tell their errors apart by nothing else.
    if isinstance(error, EOFError) or "Truncated" in str(error):
        return "one that is cut off"
    if "too much memory" in str(error):
        return "one packed with a window of over 128 MiB (zstd --long)"
    return "damaged bytes"


def _gzip_stream(file: BinaryIO) -> Any:
    return gzip.GzipFile(fileobj=file)


def _zstd_stream(file: BinaryIO) -> Any:
    from pyarrow import CompressedInputStream

    return CompressedInputStream(file, "zstd")
