"""Packed rows give what each row gives alone, and no row sees another."""

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
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bco_lightning.batch import FeedbackBatch
from bco_lightning.data.collate import collate
from bco_lightning.errors import LanguageModelError
from bco_lightning.models.layout import choose_layout, compile_layers, layout_of
from bco_lightning.models.load import load_language_model, load_policy
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.options import LoraSettings
from tests.conftest import REAL_MODEL
from tests.unit.test_log_probs import SMALL, agreement, build, make_batch

LENGTHS = [(3, 9), (12, 1), (1, 20), (7, 7)]


def changed(batch: FeedbackBatch, row: int) -> FeedbackBatch:
    """The same micro-batch with other tokens in one row."""
    ids, places = batch.input_ids_S.clone(), batch.row_spans[row].places()
    ids[places] = (ids[places] + 11) % 90 + 3
    return FeedbackBatch(**{**vars(batch), "input_ids_S": ids})


def rows_alone(model: nn.Module, batch: FeedbackBatch) -> torch.Tensor:
    """Each row in a micro-batch of its own."""
    found = []
    for row, span in enumerate(batch.row_spans):
        ids = batch.input_ids_S[span.places()].tolist()
        scored = int((batch.rows_N == row).sum())
        mask = [False] * (len(ids) - scored) + [True] * scored
        alone = collate([{"input_ids": ids, "completion_mask": mask, "thumbs_up": True, "row_id": 0}])
        found.append(completion_log_probs(model, alone))
    return torch.cat(found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("same_prompt", [False, True])
@torch.no_grad()
def test_packed_and_padded_rows_have_the_same_log_probs(name: str, same_prompt: bool) -> None:
    model = build(name)
    batch = make_batch(97, [(6, 9), (6, 1), (6, 20)] if same_prompt else LENGTHS, same_prompt)
    assert (batch.num_computed < batch.num_tokens) is same_prompt
    padded = completion_log_probs(model, batch)
    choose_layout(model, "packed")
    assert torch.allclose(completion_log_probs(model, batch), padded, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("same_prompt", [False, True])
def test_rows_that_share_a_prompt_have_the_gradient_of_rows_alone(name: str, same_prompt: bool) -> None:
    model = build(name)
    choose_layout(model, "packed")
    difference, gradient = agreement(model, make_batch(97, [(6, 9), (6, 1), (6, 20)], same_prompt), None)
    assert difference < 2e-4
    assert gradient < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_packed_row_does_not_change_by_a_bit_with_its_neighbours(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    choose_layout(model, "packed")
    batch = make_batch(97, LENGTHS)
    before = completion_log_probs(model, batch)
    for neighbour in range(len(LENGTHS)):
        after = completion_log_probs(model, changed(batch, neighbour))
        others = [row for row in range(len(LENGTHS)) if row != neighbour]
        assert torch.equal(after[others], before[others])


def test_no_gradient_reaches_a_neighbour() -> None:
    model = build("llama")
    choose_layout(model, "packed")
    embedded: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: (out.retain_grad(), embedded.append(out))[0])
    batch = make_batch(97, LENGTHS)
    completion_log_probs(model, batch)[1].backward()
    own = batch.row_spans[1].places()
    others = [place for place in range(batch.num_computed) if place not in own]
    assert embedded[0].grad[0, own].abs().sum() > 0
    assert embedded[0].grad[0, others].abs().sum() == 0


@pytest.mark.parametrize("window", [1, 3, 5, 50])
@pytest.mark.parametrize("same_prompt", [False, True])
@torch.no_grad()
def test_a_sliding_window_slides_within_the_row(window: int, same_prompt: bool) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=window)).eval()
    batch = make_batch(97, [(6, 9), (6, 2), (6, 20)], same_prompt)
    padded = completion_log_probs(model, batch)
    assert layout_of(model) == "padded"
    choose_layout(model, "packed")
    assert torch.allclose(completion_log_probs(model, batch), padded, atol=1e-4, rtol=0)


def test_qwen_models_are_packed() -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL)).eval()
    assert choose_layout(model).startswith("packed")


STATEFUL: dict[str, Any] = {
    "mamba": lambda: MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4)),
    "falcon_h1": lambda: FalconH1ForCausalLM(
        FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8)
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=16, n_layer=2, n_head=2)),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_models_whose_rows_would_see_each_other_are_padded(name: str) -> None:
    torch.manual_seed(0)
    model = STATEFUL[name]().eval()
    before = model.config._attn_implementation
    assert choose_layout(model).startswith("padded, since")
    assert (layout_of(model), model.config._attn_implementation) == ("padded", before)
    batch = make_batch(97, LENGTHS)
    with torch.no_grad():
        assert torch.allclose(completion_log_probs(model, batch), rows_alone(model, batch), atol=1e-4)
    with pytest.raises(LanguageModelError, match=r"expected a model whose rows can be packed.*model.layout: padded"):
        choose_layout(model, "packed")


def test_a_model_that_knows_its_window_from_a_mask_alone_is_padded() -> None:
    config = Qwen2MoeConfig(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=0, num_experts=4)
    chosen = choose_layout(Qwen2MoeForCausalLM(config).eval())
    assert chosen == "padded, since Qwen2MoeForCausalLM does not tell its attention how far back it sees"


def test_padding_is_taken_by_its_word() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    assert choose_layout(model, "padded") == "padded, as model.layout says"
    assert layout_of(model) == "padded"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_a_packed_model_still_takes_unpacked_input(name: str) -> None:
    model = build(name)
    ids = torch.arange(3, 40).view(1, -1).expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    before = model(input_ids=ids, attention_mask=mask).logits
    written = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
    choose_layout(model, "packed")
    assert torch.allclose(model(input_ids=ids, attention_mask=mask).logits[0], before[0], atol=1e-4)
    assert torch.allclose(model(input_ids=ids, attention_mask=mask).logits[1, 9:], before[1, 9:], atol=1e-4)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=5, do_sample=False), written)


@pytest.mark.real_model
@torch.no_grad()
def test_the_real_model_gives_the_same_packed_padded_and_with_a_shared_prompt() -> None:
    model = load_language_model(REAL_MODEL, torch.float32)
    for same_prompt in (False, True):
        batch = make_batch(49_152, [(40, 30), (40, 60), (40, 10)], same_prompt)
        choose_layout(model, "packed")
        packed = completion_log_probs(model, batch)
        model.config._attn_implementation = "sdpa"
        padded = completion_log_probs(model, batch)
        assert torch.allclose(packed, padded, atol=2e-4, rtol=0)  # sums of up to 800 nat


@pytest.mark.real_model
def test_bfloat16_gradients_of_packed_rows_are_those_of_float32_within_rounding() -> None:
    batch = make_batch(49_152, [(40, 30), (40, 60), (40, 10)], same_prompt=True)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        policy = load_policy(REAL_MODEL, dtype, LoraSettings(top_layers=4), seed=0)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 1e-2)
        choose_layout(policy, "packed")
        completion_log_probs(policy, batch).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad]))
    assert torch.linalg.norm(gradients[1] - gradients[0]) < 0.05 * torch.linalg.norm(gradients[0])


def test_compiled_layers_give_the_same_log_probs_and_gradients() -> None:
    model = build("llama")
    choose_layout(model, "packed")
    batches = [make_batch(97, LENGTHS), make_batch(97, [(6, 9), (6, 2), (6, 7)], same_prompt=True)]
    outcomes = []
    for compiled in (False, True):
        if compiled:
            compile_layers(model)
        for batch in batches:
            model.zero_grad()
            found = completion_log_probs(model, batch)
            found.sum().backward()
            outcomes.append((found.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    for plain, compiled in zip(outcomes[:2], outcomes[2:], strict=True):
        assert torch.allclose(compiled[0], plain[0], atol=1e-4)
        assert torch.linalg.norm(compiled[1] - plain[1]) < 1e-5 * torch.linalg.norm(plain[1])
