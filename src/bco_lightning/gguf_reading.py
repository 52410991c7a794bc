"""Read GGUF files in a third of the time: transformers reads a file's vocabulary three times, byte by byte."""

from __future__ import annotations

import contextlib
import struct
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from unittest import mock

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType


class QuickGGUFReader(GGUFReader):  # type: ignore[misc]
    """Reads arrays of a file's metadata at once where the parent makes two memory maps for each element.

    Elements come as bytes, or as arrays of one number, which is what transformers asks them for.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        swapped = self.byte_order != "I" or sys.byteorder != "little"
        if swapped or GGUFValueType(raw_type) != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
        kind, length = struct.unpack_from("<IQ", memoryview(self.data), orig_offs)  # type: ignore[arg-type]
        number = self.gguf_scalar_to_np.get(kind)
        start = orig_offs + 12
        if kind == GGUFValueType.STRING:
            parts, end = self._strings(start, length)
        elif number is not None:
            values = np.frombuffer(self.data, number, length, start)
            parts, end = list(values.reshape(-1, 1)), start + values.nbytes
        else:
            return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
        types = [GGUFValueType.ARRAY, *([GGUFValueType(kind)] if length else [])]
        return end - orig_offs, parts, list(range(length)), types

    def _strings(self, place: int, length: int) -> tuple[list[bytes], int]:
        strings = []
        content = memoryview(self.data)  # type: ignore[arg-type]
        size_of = struct.Struct("<Q").unpack_from
        for _ in range(length):
            (size,) = size_of(content, place)
            strings.append(bytes(content[place + 8 : place + 8 + size]))
            place += 8 + size
        return strings, place


@contextlib.contextmanager
def quick_gguf() -> Iterator[None]:
    """Within it transformers reads GGUF files by :class:`QuickGGUFReader`, and makes a table of names once.

    transformers 5.23 makes that table, 20,000 entries, for each submodule of a model again.
    """
    with (
        mock.patch.object(gguf, "GGUFReader", QuickGGUFReader),
        mock.patch.object(gguf, "get_tensor_name_map", lru_cache(gguf.get_tensor_name_map)),
    ):
        yield
