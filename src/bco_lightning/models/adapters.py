"""Low-rank adapters: made, loaded, and computed in one autograd function that keeps no float32 copies."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bco_lightning.errors import ConfigError, LanguageModelError, UserError
from bco_lightning.identity import drawing_from
from bco_lightning.models.experts import routers_of, stacked_experts
from bco_lightning.models.layout import seeing_parts_of
from bco_lightning.models.refusals import (
    adapter_fields,
    in_words,
    refuse_incomplete,
    refuse_unsafe_adapter,
    refuse_unswitchable,
)
from bco_lightning.options import LoraSettings
from bco_lightning.parallel.sharding import final_dtype

REFERENCE_ADAPTER = "reference"
# Names that layers of experts had before they were stacked.
_FUSED = {**dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), ".experts.gate_up_proj"), "w2": ".experts.down_proj"}
_MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
_SHARED = re.compile("vblora_vector_bank|tinylora_v|unilora_theta_d")  # which layers have, and files once


def add_adapters(
    base: PreTrainedModel,
    settings: LoraSettings,
    seed: int,
    base_name: str,
    train_router: bool | None = None,
    vision_tower: bool = False,
) -> Any:
    """Puts new adapters, float32, beside the linear layers of a model, whose own weights are frozen.

    PEFT writes ``base_name`` into every exported adapter, where it is the only trace of the base model.
    """
    try:
        policy = get_peft_model(base, _lora_config(settings, base, train_router, vision_tower))
    except UserError:
        raise
    except ValueError as error:
        raise ConfigError("model.lora", f"expected settings that fit the model, found: {error}.") from error
    with drawing_from(seed, base.device):  # PEFT drew them in the data type of the base, which may yet be another one
        for module in policy.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", init_lora_weights=True)
    policy.peft_config["default"].base_model_name_or_path = base_name
    return policy


def load_adapter(base: PreTrainedModel, folder: str) -> Any:
    """Loads an adapter twice: once to be trained on, and once, frozen, as the reference."""
    with in_words(folder, "PEFT adapter"):
        refuse_unswitchable(folder)
        policy = _with_adapter(base, folder, is_trainable=True)
        policy.load_adapter(folder, REFERENCE_ADAPTER, is_trainable=False)
    for name, parameter in policy.named_parameters():
        if REFERENCE_ADAPTER in name.split("."):  # PEFT makes new, trainable ones where it casts those of embeddings
            parameter.requires_grad_(False)
    return policy


def merged(base: PreTrainedModel, folder: str) -> Any:
    """The base model with an adapter merged into its weights."""
    with in_words(folder, "PEFT adapter"):
        return merge_adapter(_with_adapter(base, folder))


def merge_adapter(policy: Any) -> Any:
    """The model with its trained adapter merged in; where layers share weights, an adapted one gets its own first."""
    layers = list(policy.get_base_model().modules())
    users = Counter(id(layer._parameters.get("weight")) for layer in layers)
    for bare in (layer.get_base_layer() for layer in layers if isinstance(layer, BaseTunerLayer)):
        if (weight := bare._parameters.get("weight")) is not None and users[id(weight)] > 1:
            users[id(weight)] -= 1
            bare.weight = nn.Parameter(weight.detach().clone())
    return policy.merge_and_unload(adapter_names=["default"])


def _with_adapter(base: PreTrainedModel, folder: str, is_trainable: bool = False) -> Any:
    refuse_unsafe_adapter(folder, base)
    _take_vocabulary(base, folder)
    policy = PeftModel.from_pretrained(base, folder, is_trainable=is_trainable)
    # Read again, since only this way PEFT gives the names that lack or are too many.
    found = policy.load_adapter(folder, "default", is_trainable=is_trainable)
    missing = [name for name in found.missing_keys if not _SHARED.search(name)]
    unexpected = [name for name in found.unexpected_keys if ".modules_to_save." not in name]  # saved twice
    refuse_incomplete(folder, "adapter", {"missing_keys": missing, "unexpected_keys": unexpected})
    return policy


def _take_vocabulary(base: Any, folder: str) -> None:
    """Makes room for the tokens that an adapter's run has added, if its file has their rows."""
    names, before = {module: f".{name}." for name, module in base.named_modules()}, base.get_input_embeddings().weight
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        kept = [name for name in file.keys() if name.endswith("weight") and "lora_" not in name]  # noqa: SIM118
        sizes = [file.get_slice(name).get_shape()[0] for end in ends for name in kept if names[end] in name]
    if (size := max(sizes, default=0)) <= len(before):
        return
    if len(sizes) < 2 and not adapter_fields(folder).get("ensure_weight_tying"):
        expected = f"expected rows of {size} tokens for embeddings and head, of which the base model has {len(before)}"
        raise LanguageModelError(folder, f"{expected}; found those of one of both.", "Save both with the adapter.")
    base.resize_token_embeddings(size, mean_resizing=False)
    for end in (base.get_input_embeddings(), base.get_output_embeddings()):
        end.weight.final_dtype = final_dtype(before)
    base.has_own_vocabulary = True  # not that of the base model, which an exported adapter names


def _lora_config(
    settings: LoraSettings, base: PreTrainedModel, train_router: bool | None, vision_tower: bool
) -> LoraConfig:
    words = [name.strip() for name in settings.target_modules.split(",")]
    head, kind = base.get_output_embeddings(), base.config.model_type
    linear = {n: m for n, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}
    # A layer of LongCat-Flash is two by its config. Towers may have more layers than the decoder.
    last = max((int(n[1]) for name in linear if (n := re.search(r"\.(\d+)\.", name))), default=0)
    num_layers = min(base.config.get_text_config().num_hidden_layers, last + 1)
    layers = list(range(max(0, num_layers - settings.top_layers), num_layers)) if settings.top_layers else None
    # PEFT expects a product, and not that kernels read a weight past its adapter.
    seeing = {id(each) for part in seeing_parts_of(base).values() for each in part.modules() if not vision_tower}
    past = {name for name in linear if kind in _MAMBA and name.endswith(".out_proj")}
    own = [n for n, m in linear.items() if n in past or id(m) in seeing or not _is_product(m)]
    targets: dict[str, Any] = {"exclude_modules": own or None, "layers_to_transform": layers}
    if stacked_experts(base) or routers_of(base):
        linear = {name: module for name, module in linear.items() if name not in own}
        targets = _among_experts(base, linear, settings, words, layers, train_router)
    elif layers is not None and words == ["all-linear"]:
        # PEFT combines layers_to_transform with names only, so the names "all-linear" stands for are spelled out.
        targets["target_modules"] = sorted({name.rpartition(".")[2] for name in linear})
    else:
        targets["target_modules"] = "all-linear" if words == ["all-linear"] else words
    return LoraConfig(r=settings.r, lora_alpha=settings.alpha, lora_dropout=0.0, task_type="CAUSAL_LM", **targets)


def _is_product(layer: Any) -> bool:
    """Whether a linear layer gives what one gives; of a model's own kinds some give more, such as routers."""
    if type(layer) is nn.Linear or not type(layer).__module__.startswith("transformers.models."):
        return True
    with suppress(Exception), torch.no_grad():
        return bool(layer(layer.weight.new_zeros(2, layer.in_features)).shape == (2, layer.out_features))
    return False


def _among_experts(
    base: Any, linear: dict[str, Any], settings: LoraSettings, words: list[str], layers: Any, train_router: bool | None
) -> dict[str, Any]:
    """What of a mixture of experts is adapted, of which many parts are parameters and no modules, name by name.

    Left to itself, PEFT knows the experts of some architectures alone, and there takes every ``down_proj`` for one:
    those of shared experts and dense layers got no adapter, and ``layers_to_transform`` did not hold.
    """
    within = tuple(f"{name}." for name in routers_of(base))
    routing = {name for name, p in base.named_parameters() if p.ndim == 2 and name.startswith(within)}
    taken = LoraConfig(target_modules={name.rpartition(".")[2] for name in linear})
    convert_peft_config_for_transformers(taken, base, None)  # leaves what PEFT does not take for an expert
    parts = {name.removesuffix(".weight"): name for name in (*stacked_experts(base), *routing)}
    for name, module in linear.items():
        if name.rpartition(".")[2] in taken.target_modules:
            parts.setdefault(name, name)
        elif type(module) is nn.Linear:  # whose weight is a matrix: none that is quantized
            parts.setdefault(name, f"{name}.weight")
    named = {
        word: [each for each in parts if f".{each}".endswith((f".{word}", _FUSED.get(word, "/")))] for word in words
    }
    whole = words == ["all-linear"]
    if not whole and (unknown := [word for word, hits in named.items() if not hits]):
        known = ", ".join(sorted({each.rpartition(".")[2] for each in parts}))
        expected = f"expected all-linear or names of layers, such as {known}; found {unknown[0]}."
        raise ConfigError("model.lora.target_modules", expected)
    chosen = set(parts) if whole else {each for hits in named.values() for each in hits}
    routers = {name.removesuffix(".weight") for name in routing}
    chosen = chosen | routers if train_router else chosen - routers if train_router is False or whole else chosen
    if layers is not None:
        chosen = {each for each in chosen if (n := re.search(r"\.(\d+)\.", each)) and int(n[1]) in layers}
    told = sorted(parts[each] for each in chosen)
    fused = any(name.endswith(".gate_up_proj") for name in told)  # two layers in one, for PEFT too
    return {
        "target_modules": [name for name in told if name in linear],
        "target_parameters": [name for name in told if name not in linear],
        "rank_pattern": {"gate_up_proj": 2 * settings.r} if fused else {},
        "alpha_pattern": {"gate_up_proj": 2 * settings.alpha} if fused else {},
    }


def choose_routers(policy: nn.Module, trained: bool | None) -> None:
    """Freezes the routers of a policy and their adapters, or sees that they are trained; ``None`` leaves them."""
    names = tuple(f"{name.replace('.base_layer', '')}." for name in routers_of(policy))
    found = [each for name, each in policy.named_parameters() if name.startswith(names)]
    for parameter in found if trained is False else ():
        parameter.requires_grad_(False)
    if trained is not None and not any(parameter.requires_grad is trained for parameter in found):
        problem = "expected a policy with routers of experts, found none to train or freeze."
        raise ConfigError("model.train_router", problem)


def fuse_adapters(model: nn.Module) -> None:
    """Replaces the forward pass of every plain LoRA layer; what PEFT knows besides stays PEFT's.

    PEFT casts a layer's input to the adapter's float32, keeps the copy, and adds three float32 terms. Here the adapter
    is cast to the input's data type instead, as autocast does; its weights, gradients and moments stay float32. With a
    matrix B of zeros the output is that of the base layer to the bit.
    """
    for module in model.modules():
        if type(module) is lora.Linear and type(module.base_layer) is nn.Linear:
            module.forward = MethodType(_adapted_forward, module)


def _adapted_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if layer.disable_adapters and not layer.merged:
        return layer.base_layer(x)  # type: ignore[no-any-return]
    adapter = None if args or kwargs else plain_adapter(layer)
    if adapter is None:
        return lora.Linear.forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    base, x_SI = layer.base_layer, _as_computed(x).reshape(-1, x.shape[-1])
    # Shapes are changed out here: some layers write into what they get, which a view made within would forbid.
    out_SO = _AdaptedLinear.apply(x_SI, base.weight, base.bias, *adapter)
    return out_SO.view(*x.shape[:-1], base.weight.shape[0])  # type: ignore[no-any-return]


def _as_computed(x: Tensor) -> Tensor:
    """What autocast makes of a layer's input; kept with it, for the other layers that get the same."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    if x.dtype == dtype or not x.is_floating_point():
        return x
    made = getattr(x, "_bco_as_computed", None)
    if made is None or made[0] != (x._version, dtype):
        x._bco_as_computed = made = ((x._version, dtype), x.to(dtype))  # type: ignore[attr-defined]
    return made[1]  # type: ignore[no-any-return]


def plain_adapter(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """Matrices A and B, and their scale, of the one adapter at work; ``None`` if it is more than two matrices."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or layer.disable_adapters or len(names) != 1:
        return None
    (name,) = names
    if layer.lora_variant.get(name) or layer.lora_bias[name] or not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def add_adapter(out_SO: Tensor, x_SI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> tuple[Tensor, ...]:
    """Adds ``s (x A') B'``, computed in the data type of x; gives A, s B and x A' as the gradients need them."""
    a_RI, b_OR = a_RI.to(x_SI.dtype), (b_OR * scaling).to(x_SI.dtype)
    low_SR = x_SI @ a_RI.T
    out_SO.addmm_(low_SR, b_OR.T)
    return a_RI, b_OR, low_SR


class _AdaptedLinear(torch.autograd.Function):
    """``x W' + b + s (x A') B'``; the base layer is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x_SI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
    ) -> Tensor:
        bias_O = None if bias_O is None else bias_O.to(x_SI.dtype)
        out_SO = nn.functional.linear(x_SI, weight_OI.to(x_SI.dtype), bias_O)
        ctx.save_for_backward(x_SI, weight_OI, *add_adapter(out_SO, x_SI, a_RI, b_OR, scaling))
        ctx.scaling = scaling
        return out_SO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_SI, weight_OI, a_RI, b_OR, low_SR = ctx.saved_tensors
        low_grad_SR = grad_SO @ b_OR
        x_grad_SI = a_grad_RI = b_grad_OR = None
        if ctx.needs_input_grad[0]:
            x_grad_SI = (grad_SO @ weight_OI.to(grad_SO.dtype)).addmm_(low_grad_SR, a_RI)
        if ctx.needs_input_grad[3]:
            a_grad_RI = (low_grad_SR.T @ x_SI).float()
            b_grad_OR = (grad_SO.T @ low_SR).float() * ctx.scaling
        return x_grad_SI, None, None, a_grad_RI, b_grad_OR, None
