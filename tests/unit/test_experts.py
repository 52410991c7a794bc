"""Mixtures of experts: the loss that balances them, how even they are, and what of them is trained."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from bco_lightning import BCOModule
from bco_lightning.errors import UserError
from bco_lightning.models.adapters import add_adapters
from bco_lightning.models.experts import Routing, balance
from bco_lightning.models.layout import set_layout
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.options import LoraSettings
from tests.conftest import tiny_data, tiny_trainer, write_jsonl
from tests.invariance.test_step_cutting import GradientRecorder
from tests.reliability.tiny_run import byte_tokenizer
from tests.unit.test_log_probs import SMALL, make_batch

ROUTED: dict[str, Any] = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = DeepseekV3Config(
    **{**SMALL, "num_key_value_heads": 2, "head_dim": 4}, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
    first_k_dense_replace=1, n_group=1, topk_group=1, moe_intermediate_size=8, kv_lora_rank=4, q_lora_rank=4,
    qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
)  # fmt: skip


def model_of(config: Any) -> Any:
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # large weights, so that experts are chosen unevenly
        parameter.data.mul_(8 if parameter.ndim > 1 else 1)
    return model


def routed(model: Any, coefficient: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of rows, of which two have the same prompt, and counts of experts."""
    batch, routing = make_batch(97, [(20, 9), (20, 4), (20, 1)], same_prompt=True), Routing(model, coefficient)
    with routing.watched(batch):
        completion_log_probs(model, batch)
    return routing.losses_B.detach(), routing.sums["expert_counts"]


@pytest.mark.parametrize("layout", ["packed", "padded", "alone"])
def test_the_loss_of_a_row_is_the_mean_over_layers_of_what_transformers_has_for_it_alone(layout: Any) -> None:
    model = model_of(MixtralConfig(**ROUTED))
    set_layout(model, layout)
    found_B, counts_LE = routed(model)
    batch = make_batch(97, [(20, 9), (20, 4), (20, 1)], same_prompt=True)
    set_layout(model, "padded")
    for row, span in enumerate(batch.row_spans):
        ids = batch.input_ids_S[span.places()]
        layers = model(input_ids=ids[None], output_router_logits=True).router_logits
        expected = sum(float(load_balancing_loss_func((each.detach(),), 4, 2)) for each in layers) / len(layers)
        assert float(found_B[row]) == pytest.approx(expected, rel=1e-5)
    assert counts_LE.sum(1).tolist() == [2.0 * (29 + 24 + 21)] * 2


@pytest.mark.parametrize(
    ("settings", "coefficient", "expected"),
    [
        ({}, "auto", 0.0),
        ({"output_router_logits": True, "router_aux_loss_coef": 0.02}, "auto", 0.02),
        ({"output_router_logits": True, "router_aux_loss_coef": 0.02}, 0.5, 0.5),
    ],
)
def test_the_coefficient_is_the_configs_own_where_transformers_would_add_the_loss(
    settings: dict[str, Any], coefficient: Any, expected: float
) -> None:
    assert Routing(model_of(MixtralConfig(**ROUTED, **settings)), coefficient).coefficient == expected


def test_balance_is_told_by_the_largest_load_and_the_entropy_of_loads() -> None:
    counts_LE = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]])
    found = balance({"expert_counts": counts_LE, "router_loss": 6.0}, 4)
    assert found == {"router_aux_loss": 1.5, "expert_load_max": 4.0, "expert_entropy": pytest.approx(0.5)}
    uneven = balance({"expert_counts": torch.tensor([[3, 1]]), "router_loss": 0.0}, 1)
    assert balance({"expert_counts": counts_LE, "router_loss": 6.0}, 0) == {}  # a step that is left out
    assert uneven["expert_entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2))


# --- what is trained

EXPERTS = {"experts.down_proj", "experts.gate_up_proj"}
SHARED = {f"shared_experts.{name}_proj" for name in ("gate", "up", "down")}
LATENT = {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"}
ATTENTION = {"k_proj", "o_proj", "q_proj", "v_proj"}


def adapted(config: Any, words: str, top_layers: int, train_router: bool | None) -> dict[int, set[str]]:
    """What has adapters, by layer."""
    settings = LoraSettings(r=2, target_modules=words, top_layers=top_layers)
    policy = add_adapters(model_of(config), settings, 0, "", train_router)
    found: dict[int, set[str]] = {}
    for name, module in policy.named_modules():
        if hasattr(module, "lora_A"):
            layer, place = re.findall(r"layers\.(\d+)\.(?:self_attn|mlp)\.(.+)", name.replace(".base_layer", ""))[0]
            own = getattr(module, "parameter_name", "weight")
            found.setdefault(int(layer), set()).add(place if own == "weight" else f"{place}.{own}")
    return found


@pytest.mark.parametrize(
    ("config", "words", "top_layers", "train_router", "expected"),
    [
        # Left to itself, PEFT adapts experts of both layers here, and neither shared experts nor the dense layer.
        (DEEPSEEK, "all-linear", 1, None, {1: LATENT | EXPERTS | SHARED}),
        (DEEPSEEK, "all-linear", 0, None,
         {0: LATENT | {"gate_proj", "up_proj", "down_proj"}, 1: LATENT | EXPERTS | SHARED}),
        (MixtralConfig(**ROUTED), "all-linear", 1, True, {1: ATTENTION | EXPERTS | {"gate"}}),
        (MixtralConfig(**ROUTED), "q_proj,w1,w2,w3", 1, None, {1: {"q_proj"} | EXPERTS}),
        (MixtralConfig(**ROUTED), "q_proj,gate", 0, None, {0: {"q_proj", "gate"}, 1: {"q_proj", "gate"}}),
        (MixtralConfig(**ROUTED), "q_proj,gate", 1, False, {1: {"q_proj"}}),
        (Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=8), "experts.down_proj", 1, None,
         {1: {"experts.down_proj"}}),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)  # fmt: skip
def test_adapters_are_where_they_are_asked_for(
    config: Any, words: str, top_layers: int, train_router: bool | None, expected: dict[int, set[str]]
) -> None:
    assert adapted(config, words, top_layers, train_router) == expected


def save_mixture(folder: Path) -> str:
    """Writes a random Mixtral with a byte tokenizer."""
    tokenizer = byte_tokenizer()
    model_of(MixtralConfig(**{**ROUTED, "vocab_size": len(tokenizer)})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.mark.parametrize(("lora", "train_router", "expected"), [(None, None, True), (None, False, False),
                                                                (LoraSettings(r=2), True, True)])  # fmt: skip
def test_routers_are_trained_or_frozen_as_asked(mixture: str, lora: Any, train_router: Any, expected: bool) -> None:
    module = BCOModule(mixture, lora=lora, train_router=train_router, dtype="float32")
    trained = {name for name, each in module.policy.named_parameters() if ".mlp.gate." in name and each.requires_grad}
    assert bool(trained) is expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora": LoraSettings(target_modules="q_proj,w9")},
         "model.lora.target_modules: expected all-linear or names of layers, such as down_proj, .*; found w9"),
        ({"router_aux_loss": 0.1, "compile": True}, "model.compile: expected false with router_aux_loss, found true"),
        ({"router_aux_loss": -1.0}, "model.router_aux_loss: expected a number of at least 0, found -1.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_words(mixture: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        BCOModule(mixture, **options).policy  # noqa: B018


@pytest.mark.parametrize("options", [{"router_aux_loss": 0.1}, {"train_router": True}], ids=str)
def test_a_model_without_experts_has_no_routers_to_balance_or_train(options: dict[str, Any], tmp_path: Path) -> None:
    model_of(LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model.{next(iter(options))}: expected"):
        BCOModule(str(tmp_path), **options).policy  # noqa: B018


# --- in a run


def test_a_step_and_what_is_logged_do_not_depend_on_how_the_step_is_cut(mixture: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n // 2}?", "completion": "word " * (1 + n % 5), "label": n % 3 > 0} for n in range(16)]
    log = write_jsonl(tmp_path / "log.jsonl", rows)

    def run(
        batch_size: int, coefficient: float, tokens: int | None = None, **options: Any
    ) -> tuple[torch.Tensor, dict[str, float]]:
        recorder = GradientRecorder()
        module = BCOModule(mixture, router_aux_loss=coefficient, dtype="float32", **options)
        trainer = tiny_trainer(max_steps=1, accumulate_grad_batches=8 // batch_size, callbacks=[recorder])
        data = tiny_data(log, batch_size=batch_size, validation_fraction=0.0, tokens_per_micro_batch=tokens)
        trainer.fit(module, data)
        names = ("router_aux_loss", "expert_load_max", "expert_entropy")
        return recorder.gradients[0], {name: float(trainer.callback_metrics[f"train/{name}"]) for name in names}

    whole, logged = run(8, 0.5)
    in_rows: list[dict[str, Any]] = [{}, {"layout": "padded"}, {"gradient_checkpointing": True}]
    for cut, told in [*(run(2, 0.5, **options) for options in in_rows), run(8, 0.5, 60)]:
        assert float((cut - whole).norm() / whole.norm()) < 1e-5
        assert told == pytest.approx(logged, rel=1e-5)
    without, _ = run(8, 0.0)
    assert float((without - whole).norm() / whole.norm()) > 0.01
