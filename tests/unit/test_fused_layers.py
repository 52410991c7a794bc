"""Fused norms and feed-forward layers: the model's own numbers, from fewer kept activations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bco_lightning.models.fused_layers import fuse_layers
from bco_lightning.models.load import load_language_model
from tests.conftest import REAL_MODEL
from tests.unit.test_log_probs import SMALL

TOKENS = torch.arange(3, 603).remainder(97).view(2, 300)  # more rows than a tile has


def build(name: str = "llama", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    kinds = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        "gemma": (GemmaConfig, GemmaForCausalLM),
        "olmo2": (Olmo2Config, Olmo2ForCausalLM),
        "phi": (PhiConfig, PhiForCausalLM),
    }
    config, model = kinds[name]
    built = model(config(**{**SMALL, **options})).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # norms begin as ones, which would hide a forgotten weight
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def outcome(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradients of a sum of them."""
    logits = model(TOKENS, use_cache=False).logits
    model.zero_grad()
    (logits.float() * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def fused(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def kept_bytes(model: nn.Module) -> int:
    """Of all that the backward pass needs, each storage once and without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(TOKENS, use_cache=False).logits
    del logits
    return sum(kept.values())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_model_to_the_bit(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    before, _ = outcome(model)
    assert fuse_layers(model.modules()) > 0
    assert torch.equal(outcome(model)[0], before)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
def test_gradients_are_those_of_float64(name: str) -> None:
    model = build(name)
    exact = outcome(copy.deepcopy(model).double())[1]
    fuse_layers(model.modules())
    found = outcome(model)[1]
    assert found.keys() == exact.keys()
    for parameter, gradient in found.items():
        assert (gradient - exact[parameter]).norm() <= 2e-5 * exact[parameter].norm(), parameter


def test_gradients_under_autocast_are_those_of_the_model() -> None:
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        before, expected = outcome(model)
        fuse_layers(model.modules())
        after, found = outcome(model)
    assert torch.equal(after, before)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() <= 0.02 * expected[name].norm(), name


def test_less_is_kept_for_the_backward_pass() -> None:
    model = build(hidden_size=64, intermediate_size=256)
    before = kept_bytes(model)
    fuse_layers(model.modules())
    layers, tokens = model.config.num_hidden_layers, TOKENS.numel()
    # The activated gate and the product; of each norm what was normed.
    assert before - kept_bytes(model) >= 4 * tokens * (layers * 2 * 256 + (2 * layers + 1) * 64)


def test_frozen_weights_get_no_gradient() -> None:
    model = build()
    fuse_layers(model.modules())
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    assert list(outcome(model)[1]) == ["model.embed_tokens.weight"]


def test_another_formula_stays_as_it_is() -> None:
    assert fuse_layers(build("phi").modules()) == 0
    gemma = build("gemma")  # its norms multiply by 1 + w
    fuse_layers(gemma.modules())
    assert all(name.endswith("mlp") for name in fused(gemma))


def test_a_norm_that_rounds_otherwise_under_autocast_stays_as_it_is() -> None:
    model = build("olmo2")  # multiplies by its weight before it rounds, which in float32 makes no difference
    fuse_layers(model.modules())
    assert all(name.endswith("mlp") for name in fused(model))


def test_no_tokens_are_taken_as_well() -> None:
    model = build()
    fuse_layers(model.modules())
    layer, nothing = model.model.layers[0], torch.empty(1, 0, model.config.hidden_size)
    assert layer.mlp(nothing).shape == layer.input_layernorm(nothing).shape == nothing.shape


def test_a_biased_and_an_adapted_projection_stay_as_they_are() -> None:
    biased = build(mlp_bias=True)
    adapted = get_peft_model(build(), LoraConfig(r=2, target_modules=["down_proj"]))
    for model in (biased, adapted):
        fuse_layers(model.modules())
        assert fused(model)
        assert not [name for name in fused(model) if name.endswith("mlp")]


def test_a_copy_computes_with_its_own_weights() -> None:
    model = build()
    fuse_layers(model.modules())
    copied = copy.deepcopy(model)
    before = outcome(copied)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(outcome(copied)[0], before)


@pytest.mark.real_model
def test_every_norm_and_feed_forward_layer_of_the_real_model_is_fused() -> None:
    model = load_language_model(REAL_MODEL, torch.float32)
    tokens = torch.arange(300, 900)[None]
    with torch.no_grad():
        before = model(tokens).logits
        assert fuse_layers(model.modules()) == 61 + 30
        assert torch.equal(model(tokens).logits, before)
