"""Log-probs and their gradients agree with a naive float64 computation on full logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from bco_lightning.batch import FeedbackBatch
from bco_lightning.errors import LanguageModelError
from bco_lightning.models import log_probs
from bco_lightning.models.language_model import load_language_model
from bco_lightning.models.log_probs import check_head, completion_log_probs
from tests.conftest import REAL_MODEL

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    models = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
        "tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=1.5)),
        "granite": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=7.0)),
        "cohere": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3)),
    }
    model = models[name]()
    for parameter in model.parameters():  # large weights, so that wrong scaling shows
        parameter.data.mul_(8 if parameter.ndim > 1 else 1)
    return model.eval()


def make_batch(vocab_size: int, lengths: list[tuple[int, int]]) -> FeedbackBatch:
    generator = torch.Generator().manual_seed(0)
    width = max(prompt + completion for prompt, completion in lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    attention, mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(lengths):
        total = prompt + completion
        ids[row, :total] = torch.randint(3, vocab_size, (total,), generator=generator)
        attention[row, :total] = 1
        mask[row, prompt:total] = True
    rows = len(lengths)
    return FeedbackBatch(ids, attention, mask, torch.ones(rows).bool(), torch.ones(rows), torch.arange(rows))


def naive_float64(model: nn.Module, batch: FeedbackBatch) -> Tensor:
    """One unpadded row at a time, full logits, float64."""
    sums = []
    for ids, attention, mask in zip(batch.input_ids_BT, batch.attention_mask_BT, batch.completion_mask_BT, strict=True):
        length = int(attention.sum())
        logits = model(input_ids=ids[None, :length]).logits[0, :-1]
        token = logits.log_softmax(-1).gather(-1, ids[1:length, None])[:, 0]
        sums.append(token[mask[1:length]].sum())
    return torch.stack(sums)


def agreement(model: nn.Module, batch: FeedbackBatch, chunk_bytes: int) -> tuple[float, float]:
    """Largest difference per sequence in nats, and relative difference of the gradient."""
    oracle = copy.deepcopy(model).double()
    ours = completion_log_probs(model, batch, chunk_bytes)
    theirs = naive_float64(oracle, batch)
    weights = torch.linspace(-1, 2, len(batch))
    (ours * weights).sum().backward()
    (theirs * weights.double()).sum().backward()
    named = dict(oracle.named_parameters())
    difference = total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            difference += float((parameter.grad.double() - named[name].grad).square().sum())
            total += float(named[name].grad.square().sum())
    return float((ours.detach().double() - theirs.detach()).abs().max()), (difference / total) ** 0.5


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_small_models_of_every_kind_of_head_agree(name: str, chunk_rows: int) -> None:
    model = build(name)
    check_head(model)
    difference, gradient = agreement(model, make_batch(97, [(3, 9), (12, 1), (1, 20)]), chunk_rows * 4 * 97)
    assert difference < 2e-4
    assert gradient < 1e-4


@pytest.mark.real_model
def test_the_real_model_agrees() -> None:
    model = load_language_model(REAL_MODEL, torch.float32)
    for parameter in model.model.layers[:28].parameters():
        parameter.requires_grad_(False)
    difference, gradient = agreement(model, make_batch(49_152, [(20, 30), (5, 60), (30, 10)]), 2**22)
    assert difference < 2e-4
    assert gradient < 1e-4


def test_prompt_and_padding_do_not_count() -> None:
    model, batch = build("llama"), make_batch(97, [(3, 4), (6, 9)])
    before = completion_log_probs(model, batch)
    batch.input_ids_BT[0, 7:] = 55  # padding of the short row
    assert torch.allclose(completion_log_probs(model, batch), before, atol=1e-6)


def test_bfloat16_models_give_float32_sums() -> None:
    model = build("llama").to(torch.bfloat16)
    assert completion_log_probs(model, make_batch(97, [(3, 9)])).dtype == torch.float32


def test_no_tensor_of_all_logits_is_made() -> None:
    model, batch = build("llama"), make_batch(97, [(2, 50), (2, 50)])
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda m, a, out: seen.append(out.numel()))
    completion_log_probs(model, batch, chunk_bytes=10 * 4 * 97).sum().backward()
    assert max(seen) == 10 * 97
    assert sum(seen) == 2 * 100 * 97  # once forward, once again in the backward pass


def test_a_head_that_the_config_does_not_explain_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "_as_configured", lambda logits, config: logits)
    with pytest.raises(LanguageModelError, match="GraniteForCausalLM"):
        check_head(build("granite"))
