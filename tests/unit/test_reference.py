"""The reference is the policy as it came in: rewards are exactly zero at step 0, and it never moves."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from bco_lightning import BCOModule, LoraSettings
from bco_lightning.errors import LanguageModelError
from bco_lightning.models import adapters
from bco_lightning.models.adapters import REFERENCE_ADAPTER
from tests.conftest import REAL_MODEL, tiny_data, tiny_module, tiny_trainer
from tests.unit.test_adapters import made


@pytest.fixture
def adapter_folder(tiny_model: str, tmp_path: Path) -> str:
    """An adapter of rank 3 with random weights, so that it changes the model."""
    policy = copy.deepcopy(tiny_module(tiny_model, lora=LoraSettings(r=3)).policy)
    torch.manual_seed(5)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    policy.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def first_batch(module: BCOModule, log: str):
    data = tiny_data(log, tokenizer=module.tokenizer)
    data.setup("fit")
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize("kind", ["lora", "full", "adapter continued", "adapter merged, then full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rewards_are_exactly_zero_before_the_first_step(
    kind: str, dtype: str, tiny_model: str, adapter_folder: str, log: str
) -> None:
    name = adapter_folder if kind.startswith("adapter") else tiny_model
    lora = LoraSettings(r=4) if kind in ("lora", "adapter continued") else None
    module = BCOModule(name, lora=lora, dtype=dtype).train()
    _, rows = module(first_batch(module, log))
    assert torch.equal(rows.rewards_B, torch.zeros_like(rows.rewards_B))
    assert rows.losses_B.tolist() == pytest.approx([0.693147] * 4, abs=1e-6)


def test_an_incoming_adapter_is_part_of_the_reference(tiny_model: str, adapter_folder: str, log: str) -> None:
    adapted, bare = tiny_module(adapter_folder), tiny_module(tiny_model)
    batch = first_batch(bare, log)
    with_adapter, without = adapted.reference.log_probs(batch), bare.reference.log_probs(batch)
    assert not torch.allclose(with_adapter, without, atol=1e-2)
    assert torch.allclose(tiny_module(adapter_folder, lora=None).reference.log_probs(batch), with_adapter, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "full", "adapter continued"])
def test_it_stays_frozen_while_the_policy_learns(kind: str, tiny_model: str, adapter_folder: str, log: str) -> None:
    module = tiny_module(
        adapter_folder if kind == "adapter continued" else tiny_model,
        lora=None if kind == "full" else LoraSettings(r=4),
    )
    batch = first_batch(module, log)
    before = module.reference.log_probs(batch)
    tiny_trainer(max_steps=4).fit(module, tiny_data(log))
    assert torch.equal(module.reference.log_probs(batch), before)
    _, rows = module(batch)
    assert (rows.rewards_B != 0).all()
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any(REFERENCE_ADAPTER in name for name in trained)


@pytest.mark.parametrize("known", ["online", "before"])
def test_a_reference_that_came_in_as_another_model_stops_the_run_before_its_first_step(
    known: str, tiny_model: str, log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tiny_model, tmp_path / "adapter", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    monkeypatch.setattr(adapters, "refuse_unswitchable", lambda folder: None)  # PEFT ties one of two copies
    module = BCOModule(str(tmp_path / "adapter"), lora=LoraSettings(), dtype="float32", reference_log_probs=known)
    with pytest.raises(LanguageModelError, match="expected a policy that is its own reference before step 1"):
        tiny_trainer(max_steps=2).fit(module, tiny_data(log, tokenizer=tiny_module(tiny_model).tokenizer))
    assert module.step_rows == []


def test_a_named_reference_takes_the_place_of_the_policy(tiny_model: str, adapter_folder: str, log: str) -> None:
    module = tiny_module(adapter_folder, lora=None, reference_name_or_path=tiny_model)
    batch = first_batch(module, log)
    assert torch.equal(module.reference.log_probs(batch), tiny_module(tiny_model).reference.log_probs(batch))
    assert (module(batch)[1].rewards_B != 0).all()


@pytest.mark.real_model
def test_rewards_of_the_real_model_are_exactly_zero_before_the_first_step(log: str) -> None:
    module = BCOModule(REAL_MODEL, lora=LoraSettings(top_layers=2))
    _, rows = module(first_batch(module, log))
    assert torch.equal(rows.rewards_B, torch.zeros_like(rows.rewards_B))
    assert (rows.policy_log_probs_B < 0).all()
