"""A fused LoRA layer is PEFT's LoRA layer; what comes in, and what is merged, is what PEFT computes unmerged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from peft.tuners import lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from bco_lightning.errors import LanguageModelError
from bco_lightning.models.adapters import add_adapters, fuse_adapters
from bco_lightning.models.load import load_language_model, load_policy
from bco_lightning.options import LoraSettings
from tests.unit.test_log_probs import SMALL


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


def made(base: str, folder: Path, num_tokens: int | None = None, **options: Any) -> Tensor:
    """Writes a random adapter of a model, and gives the logits that PEFT computes without merging."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if num_tokens:
        model.resize_token_embeddings(num_tokens)
    torch.manual_seed(1)
    policy = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **options}))
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    policy.save_pretrained(folder)
    return policy.eval()(IDS_BT).logits


IDS_BT = torch.arange(3, 23)[None]
OF_SHARED_WEIGHTS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "head, DoRA": {"target_modules": ["lm_head"], "use_dora": True},
    "embeddings, one adapter for both": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "embeddings whole": {"modules_to_save": ["embed_tokens"]},
    "embeddings whole, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "rows of embeddings": {"trainable_token_indices": [3, 4]},
    "rank and scale of each": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}, "use_rslora": True},
}


@pytest.mark.parametrize("kind", OF_SHARED_WEIGHTS)
def test_an_adapter_of_shared_weights_merges_into_what_it_computes(kind: str, tiny_model: str, tmp_path: Path) -> None:
    expected = made(tiny_model, tmp_path / "adapter", **OF_SHARED_WEIGHTS[kind])
    model = load_language_model(str(tmp_path / "adapter"), torch.float32)
    assert torch.allclose(model(IDS_BT).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"init_lora_weights": "pissa"}, "takes part of its base model"),
        ({"init_lora_weights": "olora"}, "takes part of its base model"),
        ({"alora_invocation_tokens": [3]}, "some tokens switch on"),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "ties weights"),
        ({"bias": "all"}, "trains biases"),
    ],
)
def test_an_adapter_that_would_be_another_when_it_is_loaded_twice_is_not_trained_on(
    options: dict[str, Any], found: str, tiny_model: str, tmp_path: Path
) -> None:
    made(tiny_model, tmp_path / "adapter", **options)
    with pytest.raises(LanguageModelError, match=found):
        load_policy(str(tmp_path / "adapter"), torch.float32, LoraSettings(), seed=0)


def test_only_the_trained_copy_of_an_adapter_of_embeddings_is_trained(tiny_model: str, tmp_path: Path) -> None:
    made(tiny_model, tmp_path / "adapter", target_modules=["embed_tokens"])
    policy = load_policy(str(tmp_path / "adapter"), torch.bfloat16, LoraSettings(), seed=0)
    assert {name.split(".")[-1] for name, each in policy.named_parameters() if each.requires_grad} == {"default"}


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}], ids=["frozen", "trained"])
@pytest.mark.parametrize("lora", [None, LoraSettings()], ids=["merged", "continued"])
def test_an_adapter_whose_run_added_tokens_comes_in_with_their_rows(
    options: dict[str, Any], lora: LoraSettings | None, tiny_model: str, tmp_path: Path
) -> None:
    size = len(AutoModelForCausalLM.from_pretrained(tiny_model).get_input_embeddings().weight)
    expected = made(tiny_model, tmp_path / "adapter", size + 2, **options)
    policy = load_policy(str(tmp_path / "adapter"), torch.float32, lora, seed=0)
    assert expected.shape[-1] == size + 2
    assert torch.allclose(policy(IDS_BT).logits, expected, atol=1e-5)


def test_added_tokens_with_rows_of_embeddings_alone_are_refused_with_both_sizes(
    tiny_model: str, tmp_path: Path
) -> None:
    size = len(AutoModelForCausalLM.from_pretrained(tiny_model).get_input_embeddings().weight)
    made(tiny_model, tmp_path / "adapter", size + 2, modules_to_save=["embed_tokens"])
    rows = {"base_model.model.model.embed_tokens.weight": torch.zeros(size + 2, 32)}
    whole = load_file(tmp_path / "adapter/adapter_model.safetensors")
    own = {name: value for name, value in whole.items() if "lora" in name}
    save_file({**own, **rows}, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(LanguageModelError, match=rf"rows of {size + 2} tokens .*base model has {size}"):
        load_language_model(str(tmp_path / "adapter"), torch.float32)


def test_what_peft_cannot_merge_is_said_in_its_words(tiny_model: str, tmp_path: Path) -> None:
    made(tiny_model, tmp_path / "adapter", lora_bias=True)
    with pytest.raises(LanguageModelError, match="Impossible to merge LoRA with `lora_bias=True`"):
        load_language_model(str(tmp_path / "adapter"), torch.float32)


def test_an_adapter_of_made_up_tokens_is_refused(tiny_model: str, tmp_path: Path) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path)
    for settings in (None, LoraSettings()):
        with pytest.raises(LanguageModelError, match="found a prompt-learning adapter"):
            load_policy(str(tmp_path), torch.float32, settings, seed=0)


def test_adapters_of_the_top_layers_are_at_their_experts_too_and_in_no_other_layer() -> None:
    adapters = []
    for number in (0, 1):
        model = MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2))
        policy = add_adapters(model, LoraSettings(r=2, top_layers=number), 0, "")
        adapters.append({name: each.shape for name, each in policy.named_parameters() if "lora_" in name})
    everywhere, top = adapters
    assert any("experts" in name for name in top)
    assert top == {name: shape for name, shape in everywhere.items() if ".layers.1." in name}
