"""A GGUF file is converted once, by content, and its weights are those that stand in it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from bco_lightning.errors import LanguageModelError
from bco_lightning.models import gguf
from bco_lightning.models.gguf import FOLDER, converted
from bco_lightning.models.load import load_language_model, load_tokenizer

WIDTH, WORDS = 32, ["<s>", "</s>", "a", "b", "ab"]


def write_gguf(path: Path, seed: int, without: str = "") -> dict[str, np.ndarray]:
    """A Llama of one layer, its embedding and head of random numbers."""
    generator = np.random.default_rng(seed)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {f"blk.0.{name}.weight": (WIDTH, WIDTH) for name in square}
    shapes |= {f"blk.0.{name}.weight": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {"token_embd.weight": (len(WORDS), WIDTH), "output.weight": (len(WORDS), WIDTH)}
    shapes |= {"output_norm.weight": (WIDTH,)}
    tensors = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name in tensors.keys() - {without}:
        writer.add_tensor(name, tensors[name])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return tensors


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_weights_and_tokenizer_are_those_of_the_file(tmp_path: Path, cache: Path) -> None:
    tensors = write_gguf(tmp_path / "tiny.gguf", seed=0)
    model = load_language_model(str(tmp_path / "tiny.gguf"), torch.float32, mapped=True, cache_folder=str(cache))
    assert torch.equal(model.lm_head.weight, torch.from_numpy(tensors["output.weight"]))
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, torch.from_numpy(tensors["blk.0.ffn_down.weight"]))
    assert load_tokenizer(str(tmp_path), cache_folder=str(cache))("ab")["input_ids"] == [4]


def test_a_file_is_converted_once_and_anew_when_it_changes(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, seed=0)
    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(lambda _: converted(file, cache), range(3))
    assert set(others) == {first}
    written = (first / "model.safetensors").stat()
    file.rename(tmp_path / "moved.gguf")
    assert converted(tmp_path / "moved.gguf", cache) == first
    assert (first / "model.safetensors").stat() == written
    write_gguf(file, seed=1)
    assert converted(file, cache) != first
    assert not list((cache / FOLDER).glob(".*"))


def test_a_file_that_changes_while_it_is_converted_is_not_kept_under_what_it_held(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, convert = tmp_path / "tiny.gguf", gguf._convert
    write_gguf(file, seed=0)

    def change(*given: Any) -> None:
        write_gguf(file, seed=1)
        convert(*given)

    monkeypatch.setattr(gguf, "_convert", change)
    with pytest.raises(LanguageModelError, match="expected a file that stays as it is while it is converted"):
        converted(file, cache)
    assert [path.suffix for path in (cache / FOLDER).iterdir()] == [".lock"]


def test_a_cut_conversion_is_made_again(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", seed=0)
    weights = converted(tmp_path / "tiny.gguf", cache) / "model.safetensors"
    whole = weights.read_bytes()
    os.truncate(weights, 100)
    converted(tmp_path / "tiny.gguf", cache)
    assert weights.read_bytes() == whole


def test_a_file_without_a_weight_is_refused_by_its_name_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", seed=0, without="blk.0.ffn_up.weight")
    with pytest.raises(LanguageModelError, match=r"found none of model.layers.0.mlp.up_proj.weight\."):
        load_language_model(str(tmp_path / "tiny.gguf"), torch.float32, cache_folder=str(cache))
    assert [path.suffix for path in (cache / FOLDER).iterdir()] == [".lock"]


def test_a_damaged_file_is_named_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, seed=0)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(LanguageModelError, match=r"tiny\.gguf: expected a causal language model"):
        load_language_model(str(file), torch.float32, cache_folder=str(cache))
    assert [path.suffix for path in (cache / FOLDER).iterdir()] == [".lock"]
