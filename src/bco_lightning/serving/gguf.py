"""A policy as a GGUF file, which llama.cpp and all that is built on it serve, and a Modelfile for Ollama beside it."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any, Literal

import gguf
import torch
from jinja2 import TemplateError
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from bco_lightning.errors import LanguageModelError

GgufDtype = Literal["f32", "f16", "bf16", "q8_0"]
_KINDS = ("llama", "qwen2", "qwen3")  # whose tensors are only renamed and, with Llama's, put in order
# How text is cut up before its bytes are merged, by llama.cpp's name for it, and whether known words are not merged.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {
    "gpt-2": (["ByteLevel"], False),
    "smollm": (["Digits", "ByteLevel"], False),
    "qwen2": ([_WORDS + _OTHERS, "ByteLevel"], False),
    "llama-bpe": ([_WORDS + "{1,3}" + _OTHERS, "ByteLevel"], True),
}
_SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "penalty_repeat"}
_ROLES = {"\x11": "system", "\x12": "user", "\x13": "assistant"}  # by a mark in the place of what is said
_T = r"[^\x11-\x14]*?)"
_PARTS = re.compile(  # what a chat template puts first, and before and after each, in four chats
    rf"(?P<first>{_T}(?P<s>{_T}\x11(?P<S>{_T}(?P<u>{_T}\x12(?P<U>{_T}(?P<a>{_T}\x13(?P<A>{_T}(?P=u)\x12(?P=U)(?P<end>{_T}"
    rf"\x14(?P=first)((?P=s)(?P<default>{_T}(?P=S))?(?P=u)\x12(?P=U)(?P=end)\x14(?P=first)(?P=s)\x11(?P=S)(?P=u)\x12(?P=U)"
    r"\x14(?P=first)(?P=s)\x11(?P=S)"
)


def write_gguf(model: Any, tokenizer: Any, file: Path, dtype: GgufDtype) -> None:
    """Writes a model, matrices in ``dtype`` or else f16, and its tokenizer as one file."""
    config, kind = model.config, model.config.model_type
    if kind not in _KINDS or set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise _refused(f"full attention, and one of {', '.join(_KINDS)}", f"a model of kind {kind}")
    writer = gguf.GGUFWriter(file, kind)
    _add_numbers(writer, model)
    _add_vocabulary(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    weights = model.state_dict()
    if model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr():
        weights.pop("lm_head.weight")  # llama.cpp takes the embedding in its place
    for name, tensor in weights.items():
        values, stored = tensor.float().cpu().numpy(), gguf.GGMLQuantizationType[dtype.upper()]
        if kind == "llama" and (part := re.search(r"\.([qk])_proj\.", name)):  # the two that turn together side by side
            heads = config.num_attention_heads if part[1] == "q" else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 1 or values.shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
            stored = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else "F16"]
        if (known := names.get_name(name, try_suffixes=(".weight", ".bias"))) is None:
            raise _refused("weights that GGUF has names for", name)
        writer.add_tensor(known, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_numbers(writer: Any, model: Any) -> None:
    config, kind, rope = model.config, model.config.model_type, model.config.rope_parameters
    frequencies = model.model.rotary_emb.inv_freq.double().cpu()
    width, kinds = 2 * len(frequencies), ("rope.dimension_count", "attention.key_length", "attention.value_length")
    numbers = {name: getattr(config, ours or "", None) for name, ours in GGUF_CONFIG_MAPPING[kind].items()}
    numbers |= {**dict.fromkeys(kinds, width), "rope.freq_base": float(rope["rope_theta"])}
    numbers = {f"{kind}.{name}": value for name, value in numbers.items()}
    numbers |= {f"general.sampling.{name}": getattr(model.generation_config, ours) for ours, name in _SAMPLING.items()}
    for name, value in numbers.items():
        if value is not None:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name, value)
    if kind == "llama" and rope["rope_type"] == "llama3":  # llama.cpp divides the plain frequencies
        plain = rope["rope_theta"] ** -(torch.arange(0, width, 2).double() / width)
        writer.add_tensor("rope_freqs.weight", (plain / frequencies).float().numpy())
    elif rope["rope_type"] != "default":
        raise _refused("positions as they are, or scaled as in Llama 3.1", f"{kind}, {rope['rope_type']}")


def _add_vocabulary(writer: Any, tokenizer: Any, size: int) -> None:
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    cutter, model = told["pre_tokenizer"] or {"type": "nothing"}, told["model"]
    found = [part.get("pattern", {}).get("Regex", part["type"]) for part in cutter.get("pretokenizers", [cutter])]
    known = [name for name, cuts in _CUTS.items() if cuts == (found, model.get("ignore_merges", False))]
    if model["type"] != "BPE" or not known or (told["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        raise _refused(f"a byte-level tokenizer that cuts text as {', '.join(_CUTS)} do", f"{model['type']} of {found}")
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    kinds = dict.fromkeys(words, gguf.TokenType.NORMAL)
    for number, token in tokenizer.added_tokens_decoder.items():
        kinds[number] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(known[0])
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([kinds.get(number, gguf.TokenType.UNUSED) for number in range(size)])
    with tempfile.TemporaryDirectory() as folder:  # beside the file transformers would read these in its place
        tokenizer.save_pretrained(folder)
        gguf.SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def modelfile(file: Path, tokenizer: Any, generation: Any) -> str:
    """What ``ollama create`` reads: the file, the chat template in Ollama's words, where to stop and how to sample."""

    def said(marks: str, ends: bool = False) -> str:
        turns = [{"role": _ROLES[mark], "content": mark} for mark in marks]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ends))
        return text.removeprefix(tokenizer.decode(tokenizer("").input_ids))  # what the server adds, too

    found, template = None, ["# This chat template cannot be said in Ollama's words: see that Ollama knows it."]
    with contextlib.suppress(TemplateError, ValueError):
        chats = said("\x11\x12\x13\x12", ends=True), said("\x12", ends=True), said("\x11\x12"), said("\x11")
        found = _PARTS.fullmatch("\x14".join(chats))
    if found and not any(mark in found.string for mark in ('"""', "{{")):
        cases = (
            f'{{{{ if eq .Role "{role}" }}}}{found[role[0]]}{{{{ .Content }}}}{found[role[0].upper()]}{{{{ end }}}}'
            for role in _ROLES.values()
        )
        template = [
            f'TEMPLATE """{found["first"]}{{{{ range .Messages }}}}{"".join(cases)}{{{{ end }}}}{found["end"]}"""'
        ]
        template += [f'SYSTEM """{found["default"]}"""'] if found["default"] else []
    told = [(name.replace("repetition", "repeat"), getattr(generation, name)) for name in _SAMPLING]
    numbers = [f"PARAMETER {name} {value}" for name, value in told if value is not None]
    return "\n".join([f"FROM ./{file.name}", *template, f'PARAMETER stop "{tokenizer.eos_token}"', *numbers]) + "\n"


def _refused(expected: str, found: str) -> LanguageModelError:
    return LanguageModelError("--gguf", f"expected {expected}, found {found}.", "Try --merge, and llama.cpp's scripts.")
