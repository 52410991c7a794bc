"""Models without their weights: shapes and names alone, on PyTorch's meta device, for what is worked out beforehand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from bco_lightning.errors import LanguageModelError, UserError
from bco_lightning.models.adapters import add_adapters
from bco_lightning.models.load import locate_model
from bco_lightning.options import LoraSettings

# Published Llama 3.1: hidden size, layers, heads, key-value heads, feed-forward size.
_LLAMA = {"8B": (4096, 32, 32, 8, 14336), "70B": (8192, 80, 64, 8, 28672), "405B": (16384, 126, 128, 8, 53248)}
NAMED_SHAPES = tuple(_LLAMA)


def unloaded_model(name_or_path: str, lora: LoraSettings | None = None) -> Any:
    """Makes a causal language model, with ``lora`` a PEFT model of one, whose weights are neither read nor made.

    Source:
        Grattafiori et al. 2024, "The Llama 3 Herd of Models", arXiv:2407.21783, table 3; the vocabulary and the size of
        405B's key-value heads as in the published configs.
    """
    try:
        config = _llama(name_or_path) if name_or_path in _LLAMA else _config_of(name_or_path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            return model if lora is None else add_adapters(model, lora, 0, name_or_path)
    except UserError:
        raise
    except Exception as error:  # whatever transformers makes of a config, or of a name that is none
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LanguageModelError(
            name_or_path,
            f"expected a causal language model that transformers knows, found none ({said}).",
            f"Give {', '.join(NAMED_SHAPES)}, a hub id, a folder, a .gguf file or package:NAME.",
        ) from error


def _llama(name: str) -> LlamaConfig:
    hidden, layers, heads, key_value_heads, feed_forward = _LLAMA[name]
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=feed_forward,
        tie_word_embeddings=False,
    )


def _config_of(name_or_path: str) -> Any:
    source = locate_model(name_or_path)
    if source.is_adapter:
        raise LanguageModelError(
            name_or_path, "expected a model, found an adapter.", "Name its base model, and the rank of the adapters."
        )
    gguf = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    return AutoConfig.from_pretrained(source.location, trust_remote_code=False, **gguf)
