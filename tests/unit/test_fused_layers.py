"""Fused norms and feed-forward layers: the model's own numbers, from fewer kept activations."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
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
from transformers.models.llama.modeling_llama import LlamaMLP

from bco_lightning.batch import FeedbackBatch
from bco_lightning.models import attention
from bco_lightning.models.adapters import fuse_adapters
from bco_lightning.models.fused_layers import fuse_layers
from bco_lightning.models.layout import causal_lm_of, packed_states, set_layout
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.models.prepare import _recompute
from bco_lightning.models.useful_flops import UsefulFlops
from tests.unit.test_log_probs import SMALL, make_batch

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


def kept_bytes(model: nn.Module, compute: Callable[[], Any] | None = None) -> int:
    """Of all that the backward pass needs, each storage once and without the weights."""
    compute = compute or (lambda: model(TOKENS, use_cache=False).logits)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = compute()
    del found
    return sum(kept.values())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_model_to_the_bit(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    before, _ = outcome(model)
    fuse_layers(model.modules())
    assert fused(model)
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


@pytest.mark.parametrize(
    ("name", "options", "fused_end"),
    [
        ("phi", {}, ()),
        ("gemma", {}, ("mlp",)),  # its norms multiply by 1 + w
        ("olmo2", {}, ("mlp",)),  # its norms multiply before they round, which shows under autocast alone
        ("llama", {"mlp_bias": True}, ("norm",)),
    ],
)
def test_another_formula_stays_as_it_is(name: str, options: dict[str, Any], fused_end: tuple[str, ...]) -> None:
    model = build(name, **options)
    fuse_layers(model.modules())
    assert all(name.endswith(fused_end) for name in fused(model))
    assert bool(fused(model)) is bool(fused_end)


class Clamped(LlamaMLP):
    """As in DeepSeek V4: nothing differs before a gate or an up projection is large."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).clamp(max=7.0), self.up_proj(x).clamp(-7.0, 7.0)
        return self.down_proj(self.act_fn(gate) * up)


def test_a_clamp_that_only_large_numbers_meet_is_seen() -> None:
    model = build()
    model.model.layers[1].mlp = Clamped(model.config)
    fuse_layers(model.modules())
    assert [name for name in fused(model) if name.endswith("mlp")] == ["model.layers.0.mlp"]


def adapted(dtype: torch.dtype, seed: int = 0, **options: Any) -> nn.Module:
    model = get_peft_model(build(**options).to(dtype), LoraConfig(r=2, lora_alpha=5, target_modules="all-linear"))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) / 8
    return model


def fuse(model: nn.Module) -> None:
    fuse_adapters(model)
    fuse_layers(model.modules())


def test_an_adapted_feed_forward_layer_has_the_gradients_of_float64() -> None:
    model = adapted(torch.float32)
    logits, exact = outcome(copy.deepcopy(model).double())
    fuse(model)
    assert any(name.endswith("mlp") for name in fused(model))
    after, found = outcome(model)
    assert (after - logits).norm() <= 1e-5 * logits.norm()
    assert found.keys() == exact.keys()
    for parameter, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[parameter]).norm() <= 2e-5 * exact[parameter].norm(), parameter


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_adapted_layers_under_autocast_are_within_its_rounding_of_those_of_peft(weights: torch.dtype) -> None:
    model = adapted(weights)
    exact = outcome(copy.deepcopy(model).double())
    errors = []
    for fusing in (False, True):
        if fusing:
            fuse(model)
        with torch.autocast("cpu", torch.bfloat16):
            logits, gradients = outcome(model)
        off = [(gradients[name] - right).norm() / right.norm() for name, right in exact[1].items()]
        errors.append((float((logits - exact[0]).norm() / exact[0].norm()), float(torch.stack(off).mean())))
    (logits_of_peft, gradients_of_peft), (logits_fused, gradients_fused) = errors
    assert logits_fused <= 1.1 * logits_of_peft
    assert gradients_fused <= 1.1 * gradients_of_peft


def test_with_the_adapter_switched_off_a_feed_forward_layer_is_that_of_the_base_to_the_bit() -> None:
    model = adapted(torch.bfloat16)
    base = outcome(build().to(torch.bfloat16))[0]
    fuse(model)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(TOKENS, use_cache=False).logits, base)


class OneCall(torch.autograd.Function):
    """Keeps what a kernel for all rows keeps: queries, keys and values of its own heads, what it gives, and a sum."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.clone()
        ctx.save_for_backward(query, key, value, out, query.new_zeros(query.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(each) for each in ctx.saved_tensors[:3])


@pytest.mark.parametrize("mixed", [False, True])
def test_lora_keeps_at_most_115_kib_of_a_token_and_layer_of_8b(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 8, "num_key_value_heads": 2}
    kept = []
    monkeypatch.setattr(
        attention, "varlen_attn", lambda query, key, value, *_args, **_options: OneCall.apply(query, key, value)
    )
    monkeypatch.setattr(attention, "_has_kernel_for_all", lambda *heads: True)
    for layers in (1, 3):
        model = adapted(torch.bfloat16, **sizes, head_dim=32, num_hidden_layers=layers)
        fuse(model)
        set_layout(model, "packed")
        batch = make_batch(97, [(5, 60)] * 4)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            kept.append(kept_bytes(model, functools.partial(packed_states, causal_lm_of(model), batch)))
    a_token = (kept[1] - kept[0]) / 2 / batch.num_computed
    assert a_token * 4096 / 256 <= 115 * 1024  # everything but ranks and scales grows with the width


@pytest.mark.parametrize("adapters", [False, True])
def test_a_gpu_is_given_no_more_to_do_for_more_rows(adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_attn", lambda query, key, value, *_, **__: OneCall.apply(query, key, value))
    monkeypatch.setattr(attention, "_has_kernel_for_all", lambda *heads: True)
    model = adapted(torch.float32) if adapters else build()
    fuse(model)
    set_layout(model, "packed")
    launched = []
    for rows in (2, 8):
        batch = make_batch(97, [(3, 5)] * rows)
        with torch.profiler.profile() as profiled:
            completion_log_probs(model, batch).sum().backward()
        launched.append(sum(event.count for event in profiled.key_averages() if event.key.startswith("aten::")))
    assert launched[0] == launched[1] > 100


def test_four_answers_to_a_prompt_take_no_matrix_product_twice() -> None:
    model, batch = build(), make_batch(97, [(40, 12)] * 4, same_prompt=True)
    set_layout(model, "packed")
    in_place = {torch.ops.aten.addmm_: lambda _total, left, right, **_: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        completion_log_probs(model, batch).sum().backward()
    needed = UsefulFlops.of(model)
    assert batch.num_computed == 40 + 4 * 12
    assert counted.get_total_flops() == needed.per_token * batch.num_computed + needed.per_completion_token * 4 * 12


def in_memory(model: nn.Module, batch: FeedbackBatch) -> int:
    """Bytes that a forward pass leaves behind."""
    with torch.profiler.profile(profile_memory=True) as profiled:
        states_SH = packed_states(model, batch)
    del states_SH
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


def test_selective_recomputation_keeps_what_products_and_attention_gave() -> None:
    kept, gradients, batch = {}, [], make_batch(97, [(5, 60)] * 4)
    for recomputed in (False, True, "selective"):
        model = build(hidden_size=64, intermediate_size=256)
        set_layout(model, "packed")
        _recompute(model, recomputed == "selective") if recomputed else None
        kept[recomputed] = in_memory(model, batch)
        completion_log_probs(model, batch).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    # Queries, keys, values, what attention gives, twice, gate, up and down; heads of 8.
    of_products = 2 * 4 * batch.num_computed * (2 * 16 + 2 * 8 + 64 + 2 * 256 + 64)
    assert kept["selective"] - kept[True] == pytest.approx(of_products, rel=0.05)
    assert kept["selective"] < kept[False]


def test_no_tokens_are_taken_as_well() -> None:
    model = build()
    fuse_layers(model.modules())
    layer, nothing = model.model.layers[0], torch.empty(1, 0, model.config.hidden_size)
    assert layer.mlp(nothing).shape == layer.input_layernorm(nothing).shape == nothing.shape


def test_a_copy_computes_with_its_own_weights() -> None:
    model = build()
    fuse_layers(model.modules())
    copied = copy.deepcopy(model)
    before = outcome(copied)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(outcome(copied)[0], before)
