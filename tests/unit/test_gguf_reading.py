"""GGUF files are read faster, and read the same."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from transformers.integrations.ggml import _gguf_parse_value

from bco_lightning.gguf_reading import QuickGGUFReader, quick_gguf
from bco_lightning.places import resolve_packaged
from tests.conftest import REAL_MODEL


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.name", "ünïcode 👍")
    writer.add_array("strings", ["", "a", "ü" * 300])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("fractions", [0.5, 1e-9])
    writer.add_array("switches", [True, False])
    writer.add_float32("a.number", 2.5)
    writer.add_tensor("weight", torch.arange(64.0).reshape(2, 32).numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path


def values(reader: GGUFReader) -> dict[str, Any]:
    """Fields as transformers reads them."""
    return {
        name: [_gguf_parse_value(field.parts[place], field.types) for place in field.data]
        for name, field in reader.fields.items()
    }


def test_every_kind_of_field_reads_as_by_gguf_itself(file: Path) -> None:
    quick, own = QuickGGUFReader(file), GGUFReader(file)
    assert values(quick) == values(own)
    assert [field.types for field in quick.fields.values()] == [field.types for field in own.fields.values()]
    assert quick.tensors[0].data.tolist() == own.tensors[0].data.tolist()


@pytest.mark.real_model
def test_the_packaged_model_reads_as_by_gguf_itself() -> None:
    path = next(Path(resolve_packaged(REAL_MODEL)).parent.rglob("*.gguf"))
    quick, own = QuickGGUFReader(path), GGUFReader(path)
    assert values(quick) == values(own)
    assert [(tensor.name, tensor.data_offset) for tensor in quick.tensors] == [
        (tensor.name, tensor.data_offset) for tensor in own.tensors
    ]


def test_a_file_that_ends_early_is_an_error(file: Path) -> None:
    content = file.read_bytes()
    for length in range(24, content.index(b"switches"), 7):
        file.write_bytes(content[:length])
        with pytest.raises((struct.error, ValueError, IndexError, KeyError)):
            QuickGGUFReader(file)


def test_transformers_reads_quickly_only_within(file: Path) -> None:
    own = gguf.GGUFReader
    with quick_gguf():
        assert gguf.GGUFReader is QuickGGUFReader
        arch = gguf.MODEL_ARCH.LLAMA
        assert gguf.get_tensor_name_map(arch, 2) is gguf.get_tensor_name_map(arch, 2)
    assert gguf.GGUFReader is own
