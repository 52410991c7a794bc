"""AdamW, fused or with moments of eight bits."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from torch import nn

from bco_lightning.checkpoints.optimizers import restore_states, states_by_name
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
        options = ModelOptions("any", optimizer=name, dtype="bfloat16", learning_rate=1e-2, weight_decay=0.1)
        optimizer = make_optimizer(options, [weight])
    else:
        optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        weight.grad = slope.to(weight.dtype)
        optimizer.step()
    return weight.detach()


def test_fused_adamw_is_adamw() -> None:
    assert torch.allclose(trained("adamw").double(), trained(None), atol=1e-6)


def moved(name: OptimizerName | None) -> float:
    """How far 65,536 bfloat16 weights move on average, in updates of 5e-7; 400 should be made."""
    weight = nn.Parameter(torch.full((2**16,), 0.75, dtype=torch.bfloat16))
    options = ModelOptions("any", optimizer=name, dtype="bfloat16", learning_rate=5e-7)
    optimizer = make_optimizer(options, [weight])
    for _ in range(400):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return float((0.75 - weight.detach().double()).mean() / 5e-7)


def test_updates_that_bfloat16_would_lose_are_made_in_expectation() -> None:
    assert moved("adamw") == 0
    assert moved("adamw_bf16") == pytest.approx(400, rel=0.06)  # three standard deviations


def test_in_float32_what_rounds_at_random_is_adamw() -> None:
    assert torch.allclose(trained("adamw_bf16").double(), trained(None), atol=1e-6)


def test_what_rounds_at_random_goes_on_to_the_bit() -> None:
    ended = []
    for cut in (None, 3):
        torch.manual_seed(0)
        layer = nn.Linear(64, 64).bfloat16()
        options = ModelOptions("any", optimizer="adamw_bf16", dtype="bfloat16", learning_rate=1e-4, seed=5)
        optimizer = make_optimizer(options, [*layer.parameters()])
        for step in range(6):
            if step == cut:
                saved = copy.deepcopy(states_by_name(layer, [optimizer]))
                optimizer = make_optimizer(options, [*layer.parameters()])
                restore_states(layer, [optimizer], saved)
                torch.rand(9)  # numbers that others draw are of no account
            for parameter in layer.parameters():
                parameter.grad = torch.full_like(parameter, 1 + step)
            optimizer.step()
        ended.append(torch.cat([p.detach().flatten() for p in layer.parameters()]))
    assert torch.equal(*ended)


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
