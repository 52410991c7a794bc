"""Packed rows give what each row gives alone, and no row sees another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from bco_lightning.batch import FeedbackBatch
from bco_lightning.models import attention
from bco_lightning.models.layout import set_layout
from bco_lightning.models.load import load_language_model
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.models.prepare import _recompute
from tests.conftest import REAL_MODEL
from tests.unit.test_log_probs import SMALL, agreement, build, make_batch

LENGTHS = [(3, 9), (12, 1), (1, 20), (7, 7)]
SHARED = [(6, 9), (6, 1), (6, 20)]


def changed(batch: FeedbackBatch, row: int) -> FeedbackBatch:
    """The same micro-batch with other tokens in one row."""
    ids, places = batch.input_ids_S.clone(), batch.row_spans[row].places()
    ids[places] = (ids[places] + 11) % 90 + 3
    return FeedbackBatch(**{**vars(batch), "input_ids_S": ids})


def in_words(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, most_queries: int, most_keys: int, *,
    scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What torch says of its attention of variable length, which has no kernel for a CPU, one query at a time."""
    assert queries.dtype == keys.dtype == torch.int32
    assert (most_queries, most_keys) == (int(queries.diff().max()), int(keys.diff().max()))
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size[1] == 0
    found = []
    for row in range(len(queries) - 1):
        q, k = slice(int(queries[row]), int(queries[row + 1])), slice(int(keys[row]), int(keys[row + 1]))
        behind = (k.stop - k.start) - (q.stop - q.start)
        for place in range(q.stop - q.start):
            newest = behind + place
            oldest = 0 if window_size[0] < 0 else max(0, newest - window_size[0])
            groups = query.shape[1] // key.shape[1]
            seen_k, seen_v = (each[k][oldest : newest + 1].repeat_interleave(groups, dim=1) for each in (key, value))
            scores = torch.einsum("hd,khd->hk", query[q.start + place], seen_k)
            scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
            found.append(torch.einsum("hk,khd->hd", scores.softmax(-1), seen_v))
    return torch.stack(found)


@pytest.fixture
def calls_at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Takes the way of a GPU; how many rows each call of its kernel had."""
    calls: list[int] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, queries: Tensor, *more: Any, **told: Any) -> Tensor:
        calls.append(len(queries) - 1)
        return in_words(query, key, value, queries, *more, **told)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_has_kernel_for_all", lambda *heads: True)
    return calls


@pytest.mark.parametrize("same_prompt", [False, True])
def test_one_call_for_all_rows_has_the_log_probs_and_gradients_of_rows_alone(
    same_prompt: bool, calls_at_once: list[int]
) -> None:
    model, batch = build("llama"), make_batch(97, SHARED if same_prompt else LENGTHS, same_prompt)
    set_layout(model, "packed")
    difference, gradient = agreement(model, batch)
    assert difference < 2e-4
    assert gradient < 1e-4
    assert calls_at_once == [4] * SMALL["num_hidden_layers"]  # three rows and their prompt are four spans


@torch.no_grad()
def test_a_kernel_that_has_no_option_for_grouped_heads_is_not_told_of_them(
    calls_at_once: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, known = build("llama"), make_batch(97, LENGTHS), attention.varlen_attn
    set_layout(model, "packed")
    expected_B = completion_log_probs(model, batch)

    def of_torch_211(query: Tensor, key: Tensor, *more: Any, scale: Any, window_size: Any) -> Any:
        return known(query, key, *more, scale=scale, window_size=window_size, enable_gqa=query.shape[1] != key.shape[1])

    monkeypatch.setattr(attention, "varlen_attn", of_torch_211)
    monkeypatch.setattr(attention, "_IS_TOLD_OF_GROUPS", False)
    assert torch.equal(completion_log_probs(model, batch), expected_B)


@pytest.mark.parametrize(("size", "of_value", "has_one"), [(128, 128, True), (192, 128, False), (132, 132, False)])
def test_the_kernel_for_all_rows_is_for_values_as_wide_as_queries(
    size: int, of_value: int, has_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=9))
    common = {"is_cuda": True, "dtype": torch.bfloat16, "device": 0}
    heads = [SimpleNamespace(**common, shape=(1, 4, 9, width)) for width in (size, of_value)]
    assert attention._has_kernel_for_all(*heads) == has_one  # type: ignore[arg-type]


@torch.no_grad()
def test_under_autocast_too_one_call_is_told_of_all_rows(
    calls_at_once: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_has_kernel_for_all", lambda query, value: query.dtype == torch.bfloat16)
    model = build("llama")
    set_layout(model, "packed")
    with torch.autocast("cpu", torch.bfloat16):
        completion_log_probs(model, make_batch(97, LENGTHS))
    assert calls_at_once == [4] * SMALL["num_hidden_layers"]  # though rotated queries are float32


@pytest.mark.parametrize("recomputed", [False, True, "selective"])
def test_layers_compile_whole_whatever_the_rows(recomputed: bool | str) -> None:
    outcomes = []
    torch.compiler.reset()
    for compiled in (False, True):
        model, outcome = build("llama"), []
        set_layout(model, "packed")
        if compiled:
            _recompute(model, recomputed == "selective") if recomputed else None
            for layer in model.model.layers:
                layer.compile(backend="eager", dynamic=True, fullgraph=True)  # refuses what would break the graph
        for batch in (make_batch(97, LENGTHS), make_batch(97, SHARED, same_prompt=True)):
            model.zero_grad()
            completion_log_probs(model, batch).sum().backward()
            outcome.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        outcomes.append(torch.stack(outcome))
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("same_prompt", [False, True])
@pytest.mark.parametrize("layout", ["packed", "padded", "alone"])
def test_every_layout_has_the_log_probs_and_gradients_of_rows_alone(name: str, same_prompt: bool, layout: Any) -> None:
    model, batch = build(name), make_batch(97, SHARED if same_prompt else LENGTHS, same_prompt)
    assert (batch.num_computed < batch.num_tokens) is same_prompt
    set_layout(model, layout)
    difference, gradient = agreement(model, batch)
    assert difference < 2e-4
    assert gradient < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_packed_row_does_not_change_by_a_bit_with_its_neighbours(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    set_layout(model, "packed")
    batch = make_batch(97, LENGTHS)
    before = completion_log_probs(model, batch)
    for neighbour in range(len(LENGTHS)):
        after = completion_log_probs(model, changed(batch, neighbour))
        others = [row for row in range(len(LENGTHS)) if row != neighbour]
        assert torch.equal(after[others], before[others])


def test_no_gradient_reaches_a_neighbour() -> None:
    model = build("llama")
    set_layout(model, "packed")
    embedded: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: (out.retain_grad(), embedded.append(out))[0])
    batch = make_batch(97, LENGTHS)
    completion_log_probs(model, batch)[1].backward()
    own = batch.row_spans[1].places()
    others = [place for place in range(batch.num_computed) if place not in own]
    assert embedded[0].grad[0, own].abs().sum() > 0
    assert embedded[0].grad[0, others].abs().sum() == 0


@pytest.mark.parametrize("window", [1, 5, 50])
@pytest.mark.parametrize("same_prompt", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
@torch.no_grad()
def test_a_sliding_window_slides_within_the_row(
    window: int, same_prompt: bool, at_once: bool, request: pytest.FixtureRequest
) -> None:
    calls = request.getfixturevalue("calls_at_once") if at_once else []
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=window)).eval()
    batch = make_batch(97, SHARED, same_prompt)
    padded = completion_log_probs(model, batch)
    set_layout(model, "packed")
    assert torch.allclose(completion_log_probs(model, batch), padded, atol=1e-4, rtol=0)
    assert bool(calls) is at_once


def test_bfloat16_gradients_of_packed_rows_are_those_of_float32_within_rounding() -> None:
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build("tied").to(dtype)
        for parameter in model.parameters():
            parameter.data.div_(8 if parameter.ndim > 1 else 1)  # weights of a usual size
        set_layout(model, "packed")
        completion_log_probs(model, make_batch(97, SHARED, same_prompt=True)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten().float() for p in model.parameters()]))
    assert torch.linalg.norm(gradients[1] - gradients[0]) < 0.05 * torch.linalg.norm(gradients[0])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@torch.no_grad()
def test_a_packed_model_still_takes_unpacked_input(name: str) -> None:
    model = build(name)
    ids = torch.arange(3, 40).view(1, -1).expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    before = model(input_ids=ids, attention_mask=mask).logits
    written = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
    set_layout(model, "packed")
    found = model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(found[0], before[0], atol=1e-4)
    assert torch.allclose(found[1, 9:], before[1, 9:], atol=1e-4)
    assert torch.equal(model.generate(ids[:1], max_new_tokens=5, do_sample=False), written)


@pytest.mark.real_model
@torch.no_grad()
def test_the_real_model_gives_the_same_packed_padded_and_with_a_shared_prompt() -> None:
    model = load_language_model(REAL_MODEL, torch.float32)
    for same_prompt in (False, True):
        batch, found = make_batch(49_152, [(40, 30), (40, 60), (40, 10)], same_prompt), []
        for layout in ("packed", "padded"):
            set_layout(model, layout)
            found.append(completion_log_probs(model, batch))
        assert torch.allclose(*found, atol=2e-4, rtol=0)  # sums of up to 800 nat
