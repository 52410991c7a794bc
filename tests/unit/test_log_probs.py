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
from bco_lightning.data.collation import pack_rows
from bco_lightning.errors import LanguageModelError
from bco_lightning.models import log_probs
from bco_lightning.models.language_model import load_language_model
from bco_lightning.models.layout import choose_layout
from bco_lightning.models.log_probs import Tile, check_head, completion_log_probs
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


def make_batch(vocab_size: int, lengths: list[tuple[int, int]], same_prompt: bool = False) -> FeedbackBatch:
    """Rows of random tokens, as many of prompt and completion as ``lengths`` says."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for row, (prompt, completion) in enumerate(lengths):
        ids = torch.randint(3, vocab_size, (prompt + completion,), generator=generator).tolist()
        if same_prompt and rows:
            ids[:prompt] = rows[0]["input_ids"][:prompt]
        mask = [False] * prompt + [True] * completion
        rows.append({"input_ids": ids, "completion_mask": mask, "thumbs_up": True, "row_id": row})
    return pack_rows(rows)


def naive_float64(model: nn.Module, batch: FeedbackBatch) -> Tensor:
    """One unpadded row at a time, full logits, float64."""
    model.config._attn_implementation = "eager"
    sums = []
    for row, span in enumerate(batch.row_spans):
        ids = batch.input_ids_S[span.places()]
        scored = batch.position_ids_S[batch.predictors_N[batch.rows_N == row]]
        logits = model(input_ids=ids[None]).logits[0, scored]
        sums.append(logits.log_softmax(-1).gather(-1, ids[scored + 1, None]).sum())
    return torch.stack(sums)


def agreement(model: nn.Module, batch: FeedbackBatch, tile: Tile | None) -> tuple[float, float]:
    """Largest difference per sequence in nats, and relative difference of the gradient."""
    oracle = copy.deepcopy(model).double()
    ours = completion_log_probs(model, batch, tile)
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
@pytest.mark.parametrize("tile", [Tile(1, 97), Tile(7, 10), Tile(1000, 1000)])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_small_models_of_every_kind_of_head_agree(name: str, tile: Tile, layout: Any) -> None:
    model = build(name)
    check_head(model)
    choose_layout(model, layout)
    difference, gradient = agreement(model, make_batch(97, [(3, 9), (12, 1), (1, 20)]), tile)
    assert difference < 2e-4
    assert gradient < 1e-4


@pytest.mark.real_model
def test_the_real_model_agrees() -> None:
    model = load_language_model(REAL_MODEL, torch.float32)
    for parameter in model.model.layers[:28].parameters():
        parameter.requires_grad_(False)
    choose_layout(model, "packed")
    difference, gradient = agreement(model, make_batch(49_152, [(20, 30), (5, 60), (30, 10)]), None)
    assert difference < 2e-4
    assert gradient < 1e-4


def test_bfloat16_models_give_float32_sums() -> None:
    model = build("llama").to(torch.bfloat16)
    assert completion_log_probs(model, make_batch(97, [(3, 9)])).dtype == torch.float32


def test_a_head_that_the_config_does_not_explain_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "_scale", lambda config: 1.0)
    with pytest.raises(LanguageModelError, match="GraniteForCausalLM"):
        check_head(build("granite"))
