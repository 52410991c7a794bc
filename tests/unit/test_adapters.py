"""A fused LoRA layer is PEFT's LoRA layer."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn

from bco_lightning.models.adapters import fuse_adapters


def adapted(dtype: torch.dtype = torch.float32, bias: bool = False, **options: bool) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(12, 20, bias=bias), nn.SiLU(), nn.Linear(20, 7, bias=bias)).to(dtype),
        LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], **options),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def outcome(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of the input, gradients of the adapters."""
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    return out.detach(), x.grad, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_peft_in_float64(bias: bool) -> None:
    model = adapted(bias=bias)
    oracle = copy.deepcopy(model).double()
    fuse_adapters(model)
    assert sum("forward" in vars(module) for module in model.modules()) == 2
    x = torch.randn(2, 5, 12)
    for ours, theirs in zip(outcome(model, x), outcome(oracle, x.double()), strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_within_its_rounding_and_adapters_keep_float32_gradients() -> None:
    model = adapted(torch.bfloat16)
    oracle = copy.deepcopy(model).double()
    fuse_adapters(model)
    x = torch.randn(50, 12, dtype=torch.bfloat16)
    ours, theirs = outcome(model, x), outcome(oracle, x.double())
    assert ours[0].dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    for mine, exact in zip(ours, theirs, strict=True):
        assert torch.linalg.norm(mine.double() - exact) < 0.02 * torch.linalg.norm(exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_of_zeros_changes_no_bit(dtype: torch.dtype) -> None:
    model = adapted(dtype)
    fuse_adapters(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    x = torch.randn(50, 12, dtype=dtype)
    with model.disable_adapter():
        off = model(x)
    assert torch.equal(model(x), off)


def test_layers_with_more_than_two_matrices_stay_with_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(use_dora=True)
    expected = model(torch.ones(2, 12))
    fuse_adapters(model)
    asked: list[nn.Module] = []
    original = lora.Linear.forward
    monkeypatch.setattr(lora.Linear, "forward", lambda self, *a, **k: (asked.append(self), original(self, *a, **k))[1])
    assert torch.allclose(model(torch.ones(2, 12)), expected)
    assert len(asked) == 2


def test_what_comes_out_may_be_written_into() -> None:
    model = adapted()
    fuse_adapters(model)
    model(torch.randn(2, 3, 12)).mul_(2).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)
