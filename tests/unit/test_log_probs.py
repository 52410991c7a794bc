"""Log-probs and their gradients agree with a naive float64 computation on full logits."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
from bco_lightning.data.collate import collate
from bco_lightning.models import log_probs
from bco_lightning.models.layout import set_layout
from bco_lightning.models.load import load_language_model
from bco_lightning.models.log_probs import completion_log_probs, token_log_probs
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
    return collate(rows)


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


def tiles(rows: int, columns: int) -> Any:
    """Within it so much of the logits exists at a time."""
    return patch.object(log_probs, "tile_for", lambda _: (rows, columns))


def agreement(model: nn.Module, batch: FeedbackBatch) -> tuple[float, float]:
    """Largest difference per sequence in nats, and relative difference of the gradient."""
    oracle = copy.deepcopy(model).double()
    ours = completion_log_probs(model, batch)
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
@pytest.mark.parametrize("tile", [(7, 10), (1000, 1000)])
def test_small_models_of_every_kind_of_head_agree(name: str, tile: tuple[int, int]) -> None:
    with tiles(*tile):
        difference, gradient = agreement(build(name), make_batch(97, [(3, 9), (12, 1), (1, 20)]))
    assert difference < 2e-4
    assert gradient < 1e-4


@pytest.mark.real_model
def test_the_real_model_agrees() -> None:
    model = load_language_model(REAL_MODEL, torch.float32)
    for parameter in model.model.layers[:28].parameters():
        parameter.requires_grad_(False)
    set_layout(model, "packed")
    difference, gradient = agreement(model, make_batch(49_152, [(20, 30), (5, 60), (30, 10)]))
    assert difference < 2e-4
    assert gradient < 1e-4


def head(trained: bool, bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """States, targets, weight and bias of a head, large enough for its logits to be capped."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(23, 8, generator=generator)
    weight, shift = (torch.randn(shape, generator=generator) * 2 for shape in ((57, 8), (57,)))
    parameters = [states, weight, *([shift] if bias else [])]
    for tensor in parameters if trained else parameters[:1]:
        tensor.requires_grad_()
    return states, torch.randint(0, 57, (23,), generator=generator), weight, shift if bias else None


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize("tile", [(5, 10), (64, 64)])
def test_a_head_in_tiles_is_a_float64_log_softmax(
    trained: bool, bias: bool, soft_cap: float | None, tile: tuple[int, int]
) -> None:
    states, targets, weight, shift = head(trained, bias)
    leaves = [tensor for tensor in (states, weight, shift) if tensor is not None and tensor.requires_grad]
    with tiles(*tile):
        found = token_log_probs(states, targets, weight, shift, scale=0.7, soft_cap=soft_cap)
    logits = (states.double() @ weight.double().T + (0 if shift is None else shift.double())) * 0.7
    logits = logits if soft_cap is None else torch.tanh(logits / soft_cap) * soft_cap
    exact = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(found.double(), exact, atol=2e-5)
    coefficients = torch.linspace(-1, 1, 23)
    with tiles(*tile):
        gradients = torch.autograd.grad((found * coefficients).sum(), leaves)
    for ours, theirs in zip(gradients, torch.autograd.grad((exact * coefficients).sum(), leaves), strict=True):
        assert torch.linalg.norm(ours - theirs) < 1e-5 * torch.linalg.norm(theirs)


@tiles(5, 10)
def test_a_frozen_head_gives_the_bits_of_a_trained_one_and_of_no_gradient() -> None:
    states, targets, weight, shift = head(trained=False, bias=True)
    frozen = token_log_probs(states, targets, weight, shift)
    with torch.no_grad():
        assert torch.equal(token_log_probs(states, targets, weight, shift), frozen)
    assert torch.equal(token_log_probs(states, targets, weight.requires_grad_(), shift), frozen)


def test_logits_far_apart_and_coefficients_near_zero_make_no_denormal_numbers() -> None:
    weight = torch.tensor([[100.0], [0.0], [-100.0]], requires_grad=True)
    states = torch.ones(2, 1, requires_grad=True)
    found = token_log_probs(states, torch.tensor([0, 2]), weight)
    assert found.tolist() == [0.0, -200.0]
    (found * torch.tensor([1e-35, 1e-9])).sum().backward()
    least = torch.finfo(torch.float32).tiny
    for gradient in (weight.grad, states.grad):
        assert ((gradient == 0) | (gradient.abs() >= least)).all()
    assert weight.grad[2, 0] == pytest.approx(1e-9)


def test_a_head_under_autocast_computes_in_bfloat16_and_sums_in_float32() -> None:
    states, targets, weight, _ = head(trained=True, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_log_probs(states, targets, weight)
    rounded = states.bfloat16() @ weight.bfloat16().T
    assert found.dtype == torch.float32
    assert torch.allclose(found, rounded.float().log_softmax(-1).gather(1, targets[:, None])[:, 0], atol=1e-5)
    found.sum().backward()
    assert (states.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)


def test_an_adapted_head_is_trained_through_its_adapter() -> None:
    adapted = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    with tiles(4, 97):
        difference, gradient = agreement(adapted.get_base_model(), make_batch(97, [(3, 9), (12, 1)]))
    assert difference < 2e-4
    assert gradient < 1e-4


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations have made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._made = 0, {}  # type: ignore[var-annotated]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self._made = {place: kept for place, kept in self._made.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return made


@pytest.mark.parametrize("frozen", [False, True])
def test_memory_does_not_grow_with_the_vocabulary_but_for_the_weight_and_its_gradient(frozen: bool) -> None:
    def peak(vocabulary: int) -> int:
        hidden_NH, weight_VH = torch.randn(512, 16, requires_grad=True), torch.randn(vocabulary, 16)
        weight_VH.requires_grad_(not frozen)
        with LiveBytes() as live:
            token_log_probs(hidden_NH, torch.arange(512), weight_VH).sum().backward()
        return live.peak - (1 if frozen else 2) * weight_VH.nbytes

    with patch.object(log_probs, "MOST_KEPT", 512 * 32_000 - 1):
        assert peak(256_000) <= 1.1 * peak(32_000)
        assert (tiles_alone := peak(32_000)) < 512 * 32_000 * 4 / 2  # half of one copy of the logits
    kept = 0 if frozen else 512 * 32_000 * 4  # softmax numerators, where they find room
    assert peak(32_000) == pytest.approx(tiles_alone + kept, rel=0.3)
