"""Four-bit weights under adapters; where bitsandbytes is installed, they are tried."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bco_lightning.errors import ConfigError
from bco_lightning.models.load import load_language_model, load_policy
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.models.prepare import prepare
from bco_lightning.options import LoraSettings
from tests.unit.test_log_probs import SMALL, make_batch

quantized = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")


def test_without_bitsandbytes_it_says_what_to_install(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    hidden = {"bitsandbytes"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in hidden else find_spec(name, *a))
    with pytest.raises(ConfigError, match=r"(?s)model.quantization: expected bitsandbytes .*bco-lightning.quantized"):
        load_policy(tiny_model, torch.float32, LoraSettings(), 0, "nf4")


def test_weights_that_are_trained_are_not_quantized(tiny_model: str) -> None:
    with pytest.raises(ConfigError, match=r"model.quantization: expected none where all weights are trained"):
        load_policy(tiny_model, torch.float32, None, 0, "nf4")


@quantized
def test_four_bit_weights_are_packed_and_train_adapters(tmp_path: Path) -> None:
    wide = {**SMALL, "hidden_size": 128, "intermediate_size": 256, "head_dim": 64}  # of whole blocks of 64 weights
    LlamaForCausalLM(LlamaConfig(**wide)).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), torch.float32, LoraSettings(r=2), 0, "nf4")
    whole = load_language_model(str(tmp_path), torch.float32)
    assert prepare(policy).words.startswith("packed")
    prepare(whole)
    kinds = {type(module).__name__ for module in policy.modules()}
    assert "Linear4bit" in kinds
    batch = make_batch(97, [(3, 9), (5, 4)])
    found = completion_log_probs(policy, batch)
    exact = completion_log_probs(whole, batch)
    assert not torch.equal(found, exact)
    assert torch.allclose(found, exact, rtol=0.05)
    found.sum().backward()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert all(parameter.grad is not None for parameter in trained)
