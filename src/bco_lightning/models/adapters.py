"""LoRA layers in one autograd function: nothing is cast to float32 and no term of the sum is kept."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def fuse_adapters(model: nn.Module) -> int:
    """Replaces the forward pass of every plain LoRA layer; what PEFT knows besides stays PEFT's.

    PEFT casts a layer's input to the adapter's float32, keeps the copy, and adds three float32 terms. Here the adapter
    is cast to the input's data type instead, as autocast does; its weights, gradients and moments stay float32. With a
    matrix B of zeros the output is that of the base layer to the bit.

    Args:
        model: A PEFT model.

    Returns:
        How many layers were replaced.
    """
    layers = [
        module for module in model.modules() if type(module) is lora.Linear and type(module.base_layer) is nn.Linear
    ]
    for layer in layers:
        layer.forward = MethodType(_adapted_forward, layer)
    return len(layers)


def _adapted_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if layer.disable_adapters and not layer.merged:
        return layer.base_layer(x)  # type: ignore[no-any-return]
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    unusual = args or kwargs or layer.merged or torch.is_autocast_enabled(x.device.type)
    if unusual or len(names) != 1 or not _is_plain(layer, names[0]):
        return lora.Linear.forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    base, name = layer.base_layer, names[0]
    return _AdaptedLinear.apply(  # type: ignore[no-any-return]
        x, base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    )


def _is_plain(layer: Any, name: str) -> bool:
    """Whether an adapter is two matrices and nothing else."""
    variant, bias = layer.lora_variant.get(name), layer.lora_bias[name]
    return isinstance(layer.lora_dropout[name], nn.Identity) and not (variant or bias)


class _AdaptedLinear(torch.autograd.Function):
    """``x W' + b + s (x A') B'``; the base layer is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
    ) -> Tensor:
        x_SI = x.reshape(-1, x.shape[-1])
        a_RI, b_OR = a_RI.to(x.dtype), (b_OR * scaling).to(x.dtype)
        low_SR = x_SI @ a_RI.T
        ctx.save_for_backward(x_SI, weight_OI, a_RI, b_OR, low_SR)
        ctx.scaling, ctx.shape = scaling, x.shape
        out_SO = nn.functional.linear(x_SI, weight_OI, bias_O).addmm_(low_SR, b_OR.T)
        return out_SO.view(*x.shape[:-1], weight_OI.shape[0])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_SI, weight_OI, a_RI, b_OR, low_SR = ctx.saved_tensors
        grad_SO = grad.reshape(-1, grad.shape[-1])
        low_grad_SR = grad_SO @ b_OR
        x_grad = a_grad = b_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (grad_SO @ weight_OI).addmm_(low_grad_SR, a_RI).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            a_grad = (low_grad_SR.T @ x_SI).float()
            b_grad = (grad_SO.T @ low_SR).float() * ctx.scaling
        return x_grad, None, None, a_grad, b_grad, None
