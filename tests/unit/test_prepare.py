"""At the start each quick way is held against transformers' own forward on rows of the run."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    GemmaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from bco_lightning.batch import FeedbackBatch
from bco_lightning.errors import ConfigError, LanguageModelError
from bco_lightning.models import adapters, fused_layers, log_probs
from bco_lightning.models.layout import first_layers, layout_of
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
@pytest.mark.parametrize("recomputed", [False, True, "selective"])
def test_compiled_layers_give_the_same_log_probs_and_gradients(recomputed: bool | str) -> None:
    outcomes = []
    for compiled in (False, True):
        model, outcome = build("llama"), []
        assert prepare(model, compiled=compiled, recomputed=compiled and recomputed).compiled is compiled
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


def test_a_wrong_gradient_of_what_is_fused_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = fused_layers._RMSNorm.backward
    twice = staticmethod(lambda ctx, grad: (2 * (found := backward(ctx, grad))[0], *found[1:]))
    monkeypatch.setattr(fused_layers._RMSNorm, "backward", twice)
    assert prepare(build("llama")).words.endswith(
        "layers are not fused, which did not give the log-probs of transformers"
    )


def test_what_new_adapters_of_zeros_would_hide_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def left_out(layer: Any, x: torch.Tensor) -> Any:
        return layer.base_layer(x)

    left_out.__module__ = adapters.__name__  # by which what is fused is known
    monkeypatch.setattr(adapters, "_adapted_forward", left_out)
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"])).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "layers are not fused" in prepare(model).words
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("told", ["attention_mask", "s_aux"])
def test_attention_that_is_told_more_than_the_tokens_before_is_not_packed(told: str) -> None:
    model = build("llama")
    attention = LlamaAttention.forward

    def with_more(self: Any, *args: Any, **options: Any) -> Any:  # which changes none of the rows that are tried
        more = {told: torch.ones(1, 1, 1, 1, dtype=torch.bool)} if "packed_rows" in options else {}
        return attention(self, *args, **{**options, **more})

    for layer in model.model.layers:
        layer.self_attn.forward = MethodType(with_more, layer.self_attn)
    assert "does not take packed rows" in prepare(model).words


def test_layers_that_differ_in_a_setting_alone_are_each_tried() -> None:
    config = SmolLM3Config(**{**SMALL, "num_hidden_layers": 4}, no_rope_layers=[1, 1, 0, 1])
    model = SmolLM3ForCausalLM(config)
    with first_layers(model):
        assert len(model.model.layers) == 3


def test_layers_that_are_recomputed_switch_no_noise_on() -> None:
    model = PhimoeForCausalLM(PhimoeConfig(**SMALL, num_local_experts=4, input_jitter_noise=0.5)).eval()
    batch = make_batch(97, LENGTHS)
    expected = rows_alone(model, batch).detach()
    prepare(model, recomputed=True)
    assert any(layer.training for layer in model.model.layers)
    assert torch.allclose(completion_log_probs(model, batch), expected, atol=1e-4)


def test_a_model_that_cannot_recompute_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"model.gradient_checkpointing: expected false, found true: JetMoe"):
        prepare(JetMoeForCausalLM(JetMoeConfig(**SMALL, num_local_experts=2)), recomputed=True)


def test_noise_of_layers_that_are_recomputed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(self: Any, x: torch.Tensor) -> torch.Tensor:
        return mlp(self, x) * (1 + self.training)

    mlp = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", noisy)
    monkeypatch.setattr(LlamaMLP, "gradient_checkpointing", False, raising=False)  # as if it were one that recomputes
    with pytest.raises(ConfigError, match=r"model.gradient_checkpointing: expected layers of LlamaForCausalLM to give"):
        prepare(build("llama"), recomputed=True)


def test_all_that_is_trained_has_a_gradient_where_no_row_has_an_image() -> None:
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SMALL, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = Gemma3Config(text_config=text, vision_config={**tower, "image_size": 28, "patch_size": 14})
    model = Gemma3ForConditionalGeneration(config).eval()
    assert "not trained" not in prepare(model).words
    completion_log_probs(model, make_batch(97, LENGTHS)).sum().backward()
    assert {each.grad is not None for each in model.parameters() if each.requires_grad} == {True}  # as ddp wants it


def test_an_adapter_beside_a_weight_that_is_read_past_it_is_not_trained() -> None:
    config = JambaConfig(**SMALL, num_experts=1, mamba_d_state=4, mamba_dt_rank=2, use_mamba_kernels=False)
    model = get_peft_model(JambaForCausalLM(config), LoraConfig(r=2, target_modules=["dt_proj", "x_proj"])).eval()
    assert "dt_proj" in prepare(model).words
    trained = {name.split(".")[-4] for name, each in model.named_parameters() if each.requires_grad}
    assert trained == {"x_proj"}


def test_rows_are_tried_in_the_precision_of_a_step() -> None:
    model, ran = build("llama"), []
    model.model.norm.register_forward_hook(lambda *_: ran.append(torch.is_autocast_enabled("cpu")))
    prepare(model, precision=lambda: torch.autocast("cpu", torch.bfloat16))
    assert set(ran) == {True}
