"""One option names a hub id, a folder, a GGUF file or a packaged model; what cannot be aligned is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from bco_lightning import LoraSettings
from bco_lightning.errors import ConfigError, LanguageModelError
from bco_lightning.identity import random_state
from bco_lightning.models.load import (
    load_language_model,
    load_policy,
    load_tokenizer,
    locate_model,
    unloaded_model,
)
from bco_lightning.parallel.sharding import final_dtype, take_final_dtype
from bco_lightning.places import resolve_packaged
from tests.conftest import REAL_MODEL, tiny_data, tiny_module


def test_a_package_a_folder_and_a_gguf_file_lead_to_the_same_source() -> None:
    folder = resolve_packaged(REAL_MODEL)
    (file,) = Path(folder).glob("*.gguf")
    assert locate_model(REAL_MODEL) == locate_model(folder) == locate_model(str(file))
    assert locate_model("owner/name").location == "owner/name"


@pytest.mark.real_model
def test_a_model_that_came_from_gguf_saves_and_reloads(tmp_path: Path) -> None:
    model = load_language_model(REAL_MODEL, torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    load_tokenizer(REAL_MODEL).save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = load_tokenizer(str(tmp_path / "saved"))("A dog is", return_tensors="pt")["input_ids"]
    assert torch.equal(reloaded(ids).logits, model(ids).logits)
    assert load_tokenizer(str(tmp_path / "saved")).chat_template == load_tokenizer(REAL_MODEL).chat_template


def test_dropout_is_off_even_in_training_mode(tiny_model: str) -> None:
    model = load_language_model(tiny_model, torch.float32).train()
    ids = torch.arange(3, 30)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_lora_trains_adapters_of_the_top_layers_alone(tiny_model: str) -> None:
    policy = load_policy(tiny_model, torch.bfloat16, LoraSettings(r=2, top_layers=1), seed=0)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and ".layers.1." in name and p.dtype == torch.float32 for name, p in trained.items())
    assert not any("lm_head" in name for name in trained)


def places_of_files(suffix: str) -> list[range]:
    """Where files are mapped into this process's memory."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    return [range(*(int(end, 16) for end in line[0].split("-"))) for line in lines if line[-1].endswith(suffix)]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mapped_model_is_a_view_of_its_files_until_it_takes_its_data_type(
    stored: torch.dtype, dtype: torch.dtype, tiny_model: str, tmp_path: Path
) -> None:
    load_language_model(tiny_model, stored).save_pretrained(tmp_path / "model")
    mapped = load_language_model(str(tmp_path / "model"), dtype, mapped=True)
    places = places_of_files(".safetensors")
    assert all(any(p.data_ptr() in place for place in places) for p in mapped.parameters())
    expected = dict(load_language_model(str(tmp_path / "model"), dtype).named_parameters())
    for name, parameter in mapped.named_parameters():
        assert final_dtype(parameter) == dtype
        take_final_dtype(parameter)
        assert parameter.dtype == dtype
        assert torch.equal(parameter, expected[name]), name


def test_files_of_several_data_types_are_cast_as_they_are_read(tiny_model: str, tmp_path: Path) -> None:
    model = load_language_model(tiny_model, torch.bfloat16)
    model.model.norm.weight.data = torch.linspace(1, 2, 32)  # more digits than bfloat16 has
    model.save_pretrained(tmp_path / "model")
    mapped = load_language_model(str(tmp_path / "model"), torch.float32, mapped=True)
    assert {parameter.dtype for parameter in mapped.parameters()} == {torch.float32}
    assert torch.equal(mapped.model.norm.weight, torch.linspace(1, 2, 32))


def test_the_seed_alone_decides_the_adapters_and_no_generator_of_any_device_is_touched(
    tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adapters(dtype: torch.dtype, seed: int) -> torch.Tensor:
        policy = load_policy(tiny_model, dtype, LoraSettings(r=2), seed)
        return torch.cat([p.flatten() for p in policy.parameters() if p.requires_grad])

    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, lambda seed: pytest.fail("a generator of CUDA was seeded"))
    state = random_state()
    first = adapters(torch.float32, 3)
    assert torch.equal(adapters(torch.bfloat16, 3), first)
    assert not torch.equal(adapters(torch.float32, 4), first)
    unloaded_model("8B", LoraSettings(r=2))
    unloaded_model(tiny_model, LoraSettings(r=2))
    assert tiny_module(tiny_model, lora=None).reference.digest
    assert random_state() == state


def test_an_encoder_decoder_model_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(LanguageModelError, match="expected a decoder-only language model, found an encoder-decoder"):
        load_language_model(str(tmp_path / "t5"), torch.float32)


def test_a_tokenizer_without_an_end_token_is_refused_loaded_or_given(tiny_model: str, log: str, tmp_path: Path) -> None:
    folder = tmp_path / "no_eos"
    load_tokenizer(tiny_model).save_pretrained(folder)
    (folder / "config.json").write_text((Path(tiny_model) / "config.json").read_text())
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(LanguageModelError, match="no_eos: expected a tokenizer with an end-of-sequence"):
        load_tokenizer(str(folder))
    with pytest.raises(LanguageModelError, match="no_eos: expected a tokenizer with an end-of-sequence"):
        tiny_data(log, tokenizer=AutoTokenizer.from_pretrained(folder)).setup("fit")


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("/no/such/folder", LanguageModelError),
        ("./model.gguf", LanguageModelError),
        ("package:no_such_package", ConfigError),
        ("no-owner/no-such-model", LanguageModelError),
    ],
)
def test_a_model_that_is_not_there_is_named(name: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=name.removeprefix(".")):
        load_tokenizer(name)


def test_a_folder_without_a_model_and_a_file_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(LanguageModelError, match=r"expected config\.json"):
        locate_model(str(tmp_path))
    (tmp_path / "weights.bin").touch()
    with pytest.raises(LanguageModelError, match=r"found a \.bin file"):
        locate_model(str(tmp_path / "weights.bin"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "{"),
        ("config.json", '{"model_type": 7}'),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}'),
        ("model.safetensors", "no tensors"),
        ("model.safetensors", ""),
    ],
)
def test_a_damaged_model_folder_is_named_in_words(name: str, content: str, tiny_model: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / name).write_text(content)
    with pytest.raises(LanguageModelError, match=f"{tmp_path}/model: expected a causal language model, but"):
        load_language_model(str(tmp_path / "model"), torch.float32)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"auto_map": 7}', '{"auto_map": ["x"], "tokenizer_class": "LlamaTokenizer"}']
)
def test_a_damaged_tokenizer_is_named_in_words_or_read_without_its_code(
    content: str, tiny_model: str, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model/tokenizer_config.json").write_text(content)
    with pytest.raises(LanguageModelError, match=f"{tmp_path}/model: expected a tokenizer"):
        load_tokenizer(str(tmp_path / "model"))


def rewritten(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> str:
    save_file(change(load_file(folder / file)), folder / file, metadata={"format": "pt"})
    return str(folder)


LACKING: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], dict[str, bool], str]] = {
    "head": (lambda own: own, {"tie_word_embeddings": False}, "none of lm_head.weight."),
    "layer": (
        lambda own: {name: value for name, value in own.items() if ".1." not in name},
        {},
        r"none of model.layers.1.input_layernorm.weight, .* and 6 more\.",
    ),
    "names": (
        lambda own: {f"x.{name}": value for name, value in own.items()},
        {},
        r"none of lm_head.weight, .* more; what has no place, x.model.embed_tokens.weight",
    ),
    "shape": (
        lambda own: {**own, "model.norm.weight": torch.ones(31)},
        {},
        r"model.norm.weight of shape \(31,\) for \(32,\)",
    ),
}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("lacking", LACKING)
def test_weights_that_files_do_not_have_are_refused_by_name_and_never_drawn(
    lacking: str, mapped: bool, tiny_model: str, tmp_path: Path
) -> None:
    change, config, found = LACKING[lacking]
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(LanguageModelError, match=f"expected all weights of the model, found {found}"):
        load_language_model(rewritten(folder, "model.safetensors", change), torch.float32, mapped=mapped)


def test_a_tensor_that_an_index_names_and_no_file_has_is_refused(tiny_model: str, tmp_path: Path) -> None:
    load_language_model(tiny_model, torch.float32).save_pretrained(tmp_path, max_shard_size="1MB")
    file = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]["model.norm.weight"]
    rewritten(tmp_path, file, lambda own: {name: value for name, value in own.items() if "model.norm" not in name})
    with pytest.raises(LanguageModelError, match=r"none of model.norm.weight\."):
        load_language_model(str(tmp_path), torch.float32)


def test_weights_that_the_model_has_no_place_for_are_named(tiny_model: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    rewritten(folder, "model.safetensors", lambda own: {**own, "v_head.weight": torch.ones(1, 32)})
    with pytest.warns(UserWarning, match=r"no place for are left out: v_head.weight\."):
        load_language_model(str(folder), torch.float32)


@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)], ids=["merged", "continued"])
@pytest.mark.parametrize(
    "change",
    [
        lambda own: {},
        lambda own: {name: value for name, value in own.items() if "layers.1" not in name},
        lambda own: {name.removeprefix("base_model."): value for name, value in own.items()},
        lambda own: {name: value for name, value in own.items() if "lora_B" not in name},
        lambda own: {**own, "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(2, 32)},
    ],
    ids=["empty", "half", "misnamed", "one of two matrices", "of another model"],
)
def test_an_adapter_that_is_not_used_whole_is_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    lora: LoraSettings | None,
    tiny_model: str,
    tmp_path: Path,
) -> None:
    load_policy(tiny_model, torch.float32, LoraSettings(r=2), seed=0).save_pretrained(tmp_path)
    rewritten(tmp_path, "adapter_model.safetensors", change)
    with pytest.raises(
        LanguageModelError, match=r"expected all weights of the adapter, found .*model\.|that the weights have"
    ):
        load_policy(str(tmp_path), torch.float32, lora, seed=0)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"base_model_name_or_path": None}, "names its base model, found None"),
        ({"base_model_name_or_path": "."}, "names its base model, found '.'"),
        ({"peft_type": "NEW"}, "expected a PEFT adapter, but"),
        ({"r": "x"}, "told by numbers and names of modules, found r in its config"),
    ],
)
def test_a_damaged_adapter_is_named_in_words(
    changes: dict[str, str | None], found: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    load_policy(tiny_model, torch.float32, LoraSettings(r=2), seed=0).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    monkeypatch.chdir(folder)
    with pytest.raises(LanguageModelError, match=re.escape(found)):
        load_language_model(str(folder), torch.float32)
