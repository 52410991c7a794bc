"""What a memory plan has to know of a model, read from its config: weights are neither loaded nor made."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from bco_lightning.errors import LanguageModelError, UserError
from bco_lightning.models.layout import decoder_layers_of
from bco_lightning.models.load import locate_model

# Published Llama 3.1: hidden size, layers, heads, key-value heads, feed-forward size.
_LLAMA = {"8B": (4096, 32, 32, 8, 14336), "70B": (8192, 80, 64, 8, 28672), "405B": (16384, 126, 128, 8, 53248)}
NAMED_SHAPES = tuple(_LLAMA)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Weight:
    """One parameter of the model.

    Args:
        name: The module's own name, such as ``q_proj``.
        shape: Its shape; a linear layer's is (out, in).
        is_linear: Whether it is the weight of a linear layer, which an adapter may join.
    """

    name: str
    shape: tuple[int, ...]
    is_linear: bool


@dataclass(frozen=True)
class ModelShape:
    """What a plan has to know of a model.

    Args:
        name: For people.
        layers: Weights of each decoder layer.
        root: The other weights: embedding, head and last norm; a tied head is there once.
        hidden: Size ``H`` of the residual stream.
        vocabulary: Number ``V`` of the head's rows.
        heads: Heads of the queries.
        attention: Size ``A`` of all heads together.
        key_value: Size of all key heads together.
        feed_forward: Size ``I`` between the layers of the gated feed-forward part.
        norms: Norms of a decoder layer whose input is the residual stream or as large.
        head_norms: Whether queries and keys are normed too.
    """

    name: str
    layers: tuple[tuple[Weight, ...], ...]
    root: tuple[Weight, ...]
    hidden: int
    vocabulary: int
    heads: int
    attention: int
    key_value: int
    feed_forward: int
    norms: int
    head_norms: bool

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, tied ones once, without adapters."""
        return sum(math.prod(weight.shape) for part in (*self.layers, self.root) for weight in part)

    def num_adapter_parameters(self, rank: int) -> int:
        """Parameters of adapters beside all linear layers but the head."""
        return sum(rank * sum(weight.shape) for part in self.layers for weight in part if weight.is_linear)


def shape_of(name_or_path: str) -> ModelShape:
    """Reads a model's shape from its config; weights are neither loaded nor made.

    Args:
        name_or_path: ``8B``, ``70B`` or ``405B`` for the shapes of Llama 3.1, or a hub id, a folder, a ``.gguf`` file
            or ``package:NAME``.

    Returns:
        The shape, counted on the model's own class.

    Raises:
        LanguageModelError: If there is no such model, or its layers are not of the kind that plans are made for.

    Source:
        Grattafiori et al. 2024, "The Llama 3 Herd of Models", arXiv:2407.21783, table 3; the vocabulary and the size of
        405B's key-value heads as in the published configs.

    """
    config = _llama_config(name_or_path) if name_or_path in _LLAMA else _config_of(name_or_path)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of a config
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LanguageModelError(
            name_or_path, f"expected a causal language model that transformers knows, found another ({said})."
        ) from error
    return shape_of_model(model, name_or_path)


def shape_of_model(model: Any, name: str) -> ModelShape:
    """The shape of a causal language model, which may be on the meta device.

    Args:
        model: A transformers model without adapters.
        name: For people and errors.

    Returns:
        Its shape.

    Raises:
        LanguageModelError: If its layers are not of the kind that plans are made for.
    """
    config, layers = model.config.get_text_config(), decoder_layers_of(model)[1]
    linear = {part for module in model.modules() if type(module) is nn.Linear for part in module.parameters()}
    own = {parameter for layer in layers for parameter in layer.parameters()}
    names = [[part.rpartition(".")[2] for part, m in layer.named_modules() if type(m) is nn.Linear] for layer in layers]
    if not names or any(sorted(found) != sorted(LINEARS) for found in names):
        raise LanguageModelError(
            name,
            f"expected decoder layers of {', '.join(LINEARS)}, found {', '.join(names[0]) if names else 'others'}.",
            "Plans are made for Llama, Mistral, Qwen 2 and 3, Gemma, SmolLM and models like these.",
        )

    def weights(named: Iterable[tuple[str, nn.Parameter]]) -> tuple[Weight, ...]:
        return tuple(
            Weight(part.split(".")[-2], tuple(value.shape), value in linear and value.ndim == 2)
            for part, value in named
        )

    sizes = {part.name: part.shape for part in weights(layers[0].named_parameters()) if part.is_linear}
    return ModelShape(
        name=name,
        layers=tuple(weights(layer.named_parameters()) for layer in layers),
        root=weights((part, value) for part, value in model.named_parameters() if value not in own),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        heads=config.num_attention_heads,
        attention=sizes["q_proj"][0],
        key_value=sizes["k_proj"][0],
        feed_forward=sizes["gate_proj"][0],
        norms=sum(
            part.shape == (config.hidden_size,) and "norm" in part.name
            for part in weights(layers[0].named_parameters())
        ),
        head_norms=any(part.name == "q_norm" for part in weights(layers[0].named_parameters())),
    )


def _llama_config(name: str) -> LlamaConfig:
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
            name_or_path, "expected a model, found an adapter.", "Name its base model, and --lora_r."
        )
    gguf = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    try:
        return AutoConfig.from_pretrained(source.location, trust_remote_code=False, **gguf)
    except UserError:
        raise
    except Exception as error:  # transformers, given a name that is none
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LanguageModelError(
            name_or_path,
            f"expected a model whose config can be read, found none ({said}).",
            f"Give {', '.join(_LLAMA)}, a hub id, a folder, a .gguf file or package:NAME.",
        ) from error
