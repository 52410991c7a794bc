"""At the start each quick way is held against transformers' own forward on rows of the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from bco_lightning.batch import FeedbackBatch
from bco_lightning.errors import LanguageModelError
from bco_lightning.models import fused_layers, log_probs
from bco_lightning.models.layout import layout_of
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.models.prepare import prepare
from tests.unit.test_log_probs import SMALL, build, make_batch

LENGTHS = [(3, 9), (12, 1), (1, 20), (7, 7)]
MODELS: dict[str, Any] = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4)),
    "falcon_h1": lambda: FalconH1ForCausalLM(
        FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8)
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=16, n_layer=2, n_head=2)),
    # It knows its window from a mask alone.
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=0, num_experts=4)
    ),
    # Its class names an attribute with the decoder that it has not.
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(**SMALL, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=8)
    ),
}


def rows_alone(model: nn.Module, batch: FeedbackBatch) -> torch.Tensor:
    """By transformers, each row by itself."""
    found = []
    for row, span in enumerate(batch.row_spans):
        ids = batch.input_ids_S[span.places()]
        scored = batch.position_ids_S[batch.predictors_N[batch.rows_N == row]]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, scored]
        found.append(logits.log_softmax(-1).gather(-1, ids[scored + 1, None]).sum())
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_models_whose_packed_rows_are_not_what_rows_are_alone_are_padded(name: str) -> None:
    torch.manual_seed(0)
    model, batch = MODELS[name]().eval(), make_batch(97, LENGTHS)
    expected = rows_alone(model, batch)
    assert prepare(model).words.startswith(f"padded, since {'packed rows of ' if name == 'falcon_h1' else ''}")
    assert torch.allclose(completion_log_probs(model, batch), expected, atol=1e-4)
    with pytest.raises(LanguageModelError, match=r"expected a model whose rows can be packed.*model.layout: padded"):
        prepare(model, "packed")


def test_rows_are_packed_and_layers_fused_where_that_is_right_and_padded_where_it_is_asked_for() -> None:
    model = build("llama")
    assert prepare(model).words == "packed, without padding"
    assert "forward" in vars(model.model.norm)
    assert prepare(model, "padded").words == "padded, as model.layout says"
    assert layout_of(model) == "padded"


def test_fused_layers_that_give_other_numbers_are_left_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = GemmaForCausalLM(GemmaConfig(**SMALL)).eval()
    nn.init.normal_(model.model.norm.weight)  # norms that multiply by 1 + w, which the fused ones do not
    monkeypatch.setattr(fused_layers, "_NORM", fused_layers._recipe(type(model.model.norm)))
    monkeypatch.setattr(type(model.model.norm), "variance_epsilon", 1e-6, raising=False)
    assert prepare(model).words.startswith("packed, without padding; layers are not fused, which did not give")
    assert "forward" not in vars(model.model.norm)


def test_a_head_that_the_config_does_not_explain_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_probs, "_scale", lambda config: 1.0)
    with pytest.raises(LanguageModelError, match=r"GraniteForCausalLM: expected logits that are the output head"):
        prepare(build("granite"))


def with_rope(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    rope = {"rope_type": kind, "rope_theta": 1e4, **options}
    config, model = (Phi3Config, Phi3ForCausalLM) if kind == "longrope" else (LlamaConfig, LlamaForCausalLM)
    length = {"max_position_embeddings": 16} | ({"original_max_position_embeddings": 16} if kind == "longrope" else {})
    return model(config(**SMALL, **length, rope_parameters=rope)).eval()


@torch.no_grad()
def test_rows_that_would_change_their_neighbours_frequencies_are_computed_one_by_one() -> None:
    model = with_rope("longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4)
    batch = make_batch(97, [(3, 9), (12, 20)])
    expected = rows_alone(model, batch)
    assert prepare(model, longest=16).words.startswith("packed")
    assert prepare(model, longest=32).words.startswith("computed one by one, since its rotary frequencies follow")
    assert torch.allclose(completion_log_probs(model, batch), expected, atol=1e-4)


def test_frequencies_that_follow_what_was_ever_seen_are_refused_beyond_the_models_length() -> None:
    model = with_rope("dynamic", factor=4.0)
    assert prepare(model, longest=16).words.startswith("packed")
    with pytest.raises(LanguageModelError, match=r"expected rows of at most 16 tokens.*found a limit of 32"):
        prepare(model, longest=32)


def test_tokens_beyond_the_embeddings_are_named_with_both_numbers() -> None:
    row = {"input_ids": [5, 97, 6], "completion_mask": [False, True, True], "thumbs_up": True, "row_id": 0}
    with pytest.raises(LanguageModelError, match=r"expected tokens below 97.*found token 97 in a row"):
        prepare(build("llama"), rows=[row])


@pytest.mark.slow
def test_compiled_layers_give_the_same_log_probs_and_gradients() -> None:
    outcomes = []
    for compiled in (False, True):
        model, outcome = build("llama"), []
        assert prepare(model, compiled=compiled).compiled is compiled
        for batch in (make_batch(97, LENGTHS), make_batch(97, [(6, 9), (6, 2), (6, 7)], same_prompt=True)):
            found = completion_log_probs(model, batch)
            found.sum().backward()
            outcome += [found.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])]
        outcomes.append(outcome)
    for plain, quick in zip(*outcomes, strict=True):
        assert torch.linalg.norm(quick - plain) < 1e-5 * torch.linalg.norm(plain)


def test_layers_that_cannot_be_compiled_are_computed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(layer: nn.Module, *, disable: bool = False, **_: Any) -> None:
        def fail(*args: Any, **options: Any) -> None:
            raise RuntimeError("no compiler")

        layer._compiled_call_impl = None if disable else fail

    monkeypatch.setattr(nn.Module, "compile", broken)
    model = build("llama")
    assert prepare(model, compiled=True).words.startswith("packed, without padding; layers are not compiled")
    completion_log_probs(model, make_batch(97, LENGTHS))
