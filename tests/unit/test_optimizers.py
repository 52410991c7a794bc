"""AdamW, fused or with moments of eight bits."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from bco_lightning.errors import ConfigError
from bco_lightning.models.build import make_optimizer
from bco_lightning.options import ModelOptions, OptimizerName
from tests.conftest import tiny_data, tiny_module, tiny_trainer


def trained(name: OptimizerName | None, steps: int = 5) -> torch.Tensor:
    """5,000 weights after some steps on a fixed slope; without a name by plain AdamW in float64."""
    generator = torch.Generator().manual_seed(0)
    start, slope = torch.randn(5000, generator=generator), torch.randn(5000, generator=generator)
    weight = nn.Parameter(start if name else start.double())
    if name:
        options = ModelOptions("any", optimizer=name, learning_rate=1e-2, weight_decay=0.1)
        optimizer = make_optimizer(options, [weight])
    else:
        optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        weight.grad = slope.to(weight.dtype)
        optimizer.step()
    return weight.detach()


def test_fused_adamw_is_adamw() -> None:
    assert torch.allclose(trained("adamw").double(), trained(None), atol=1e-6)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_without_bitsandbytes_it_says_what_to_install(name: OptimizerName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(ConfigError, match=rf"(?s)model.optimizer: expected bitsandbytes .* for {name}.*quantized"):
        make_optimizer(ModelOptions("any", optimizer=name), [nn.Parameter(torch.zeros(2))])


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
def test_moments_of_eight_bits_come_near_to_adamw() -> None:
    difference = trained("adamw_8bit").double() - trained(None)
    assert difference.abs().max() < 1e-2
    assert difference.square().mean().sqrt() < 2e-3


def test_gradients_are_clipped_under_mixed_precision(tiny_model: str, log: str) -> None:
    trainer = tiny_trainer(max_steps=1, precision="bf16-mixed", gradient_clip_val=1.0)
    trainer.fit(tiny_module(tiny_model, lora=None), tiny_data(log))
    assert trainer.global_step == 1
