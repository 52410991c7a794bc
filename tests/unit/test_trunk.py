"""What stands on the frozen trunk gives the log-probs and gradients of the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bco_lightning.models.layout import FrozenTrunk, find_trunk, set_layout
from bco_lightning.models.load import load_policy
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.options import LoraSettings
from tests.conftest import REAL_MODEL
from tests.unit.test_log_probs import SMALL, make_batch

MODELS: dict[str, Any] = {
    "llama": lambda layers: LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": layers})),
    "qwen3": lambda layers: Qwen3ForCausalLM(Qwen3Config(**{**SMALL, "num_hidden_layers": layers})),
    "gemma2": lambda layers: Gemma2ForCausalLM(Gemma2Config(**{**SMALL, "num_hidden_layers": layers})),
}


def adapted(name: str = "llama", layers: int = 5, top: int = 2) -> nn.Module:
    torch.manual_seed(0)
    chosen = list(range(layers - top, layers))
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=chosen, init_lora_weights=False)
    model = get_peft_model(MODELS[name](layers).eval(), config)
    set_layout(model, "packed")
    return model


def log_probs_and_gradients(model: nn.Module, trunk: FrozenTrunk | None) -> tuple[torch.Tensor, torch.Tensor]:
    batch = make_batch(97, [(6, 9), (6, 1), (6, 20)], same_prompt=True)
    model.zero_grad()
    if trunk is None:
        found = completion_log_probs(model, batch)
    else:
        states_SH = trunk.states(batch)
        with trunk.left_out():
            found = completion_log_probs(model, batch, trunk_states_SH=states_SH)
    (found * torch.linspace(-1, 1, len(batch))).sum().backward()
    return found.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_log_probs_and_gradients_are_those_of_the_whole_model(name: str) -> None:
    model = adapted(name)
    trunk = find_trunk(model)
    assert trunk is not None
    assert trunk.depth == 3
    whole, cut = log_probs_and_gradients(model, None), log_probs_and_gradients(model, trunk)
    assert torch.allclose(cut[0], whole[0], atol=1e-5)
    assert torch.linalg.norm(cut[1] - whole[1]) <= 1e-6 * torch.linalg.norm(whole[1])


def test_only_the_layers_of_the_trunk_and_then_only_the_others_run() -> None:
    model = adapted()
    trunk = find_trunk(model)
    ran: list[int] = []
    for number, layer in enumerate(model.get_base_model().model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    states_SH = trunk.states(make_batch(97, [(3, 4)]))
    assert ran == [0, 1, 2]
    with trunk.left_out():
        completion_log_probs(model, make_batch(97, [(3, 4)]), trunk_states_SH=states_SH)
    assert ran == [0, 1, 2, 3, 4]
    assert len(model.get_base_model().model.layers) == 5


def test_a_model_that_cannot_be_cut_has_no_trunk() -> None:
    embedding_trained, padded = adapted(), adapted()
    embedding_trained.get_input_embeddings().requires_grad_(True)
    set_layout(padded, "padded")
    # It adds positions to what comes in place of tokens.
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=3, n_head=2)).eval()
    gpt2 = get_peft_model(gpt2, LoraConfig(r=2, target_modules=["c_attn"], layers_to_transform=[2]))
    set_layout(gpt2, "packed")
    for model in (adapted(top=5), embedding_trained, padded, gpt2):
        assert find_trunk(model) is None


@pytest.mark.real_model
@torch.no_grad()
def test_the_real_model_can_be_cut() -> None:
    policy = load_policy(REAL_MODEL, torch.bfloat16, LoraSettings(top_layers=8), seed=0)
    set_layout(policy, "packed")
    trunk = find_trunk(policy)
    assert trunk.depth == 22
    batch = make_batch(49_152, [(20, 30), (20, 10)])
    whole = completion_log_probs(policy, batch)
    states_SH = trunk.states(batch)
    with trunk.left_out():
        assert torch.equal(completion_log_probs(policy, batch, trunk_states_SH=states_SH), whole)
