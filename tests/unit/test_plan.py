"""Plans agree with published sizes, and within 15 % with what is alive in steps of small models on a CPU.

GPUs compute norms and feed-forward layers in one piece, and so do these measurements; nothing here was measured on one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bco_lightning import BCOModule, LoraSettings
from bco_lightning.cli.app import main
from bco_lightning.errors import LanguageModelError
from bco_lightning.models import fused_layers, log_probs
from bco_lightning.models.load import unloaded_model
from bco_lightning.models.log_probs import completion_log_probs
from bco_lightning.models.memory import PlanOptions, memory_of
from bco_lightning.models.useful_flops import UsefulFlops
from bco_lightning.parallel.strategy import named_strategy
from tests.conftest import REAL_MODEL
from tests.reliability.tiny_run import byte_tokenizer, finish, make_log, make_model, start, tiny_fit
from tests.unit.test_log_probs import LiveBytes, make_batch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from plan_table import scale_table

ALWAYS = ("weights", "gradients", "optimizer")
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "published"), [("8B", 8_030_261_248), ("70B", 70_553_706_496), ("405B", 405_853_388_800)]
)
def test_named_shapes_have_the_published_number_of_parameters(name: str, published: int) -> None:
    assert sum(parameter.numel() for parameter in unloaded_model(name).parameters()) == published


@pytest.mark.slow
@pytest.mark.real_model
def test_a_packaged_gguf_file_is_planned_from_its_header() -> None:
    assert memory_of(PlanOptions(REAL_MODEL, dtype="float32"))["weights"] == 4 * 134_515_008


@pytest.mark.parametrize(
    "lora",
    [
        None,
        LoraSettings(r=4),
        LoraSettings(r=4, top_layers=1),
        LoraSettings(r=4, target_modules="q_proj,v_proj"),
    ],
)
def test_an_unloaded_model_has_the_operations_of_the_loaded_one(lora: Any, tiny_model: str) -> None:
    policy: Any = BCOModule(tiny_model, lora=lora, dtype="float32").policy
    found, expected = UsefulFlops.of(unloaded_model(tiny_model, lora)), UsefulFlops.of(policy)
    assert (found.per_token, found.per_completion_token, found.per_squared_length) == (
        expected.per_token, expected.per_completion_token, expected.per_squared_length,
    )  # fmt: skip


# --- what is there all the time


def bytes_of_run(model: str, log: str, lora_r: int, strategy: str, devices: int) -> dict[str, int]:
    """Trains the tiny run for two steps and counts this process's tensors."""
    module: Any = BCOModule(model, dtype="float32", lora=LoraSettings(r=lora_r) if lora_r else None)
    counted: dict[str, int] = {}

    def count(optimizer: Any) -> None:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        moments = [(name, value) for state in optimizer.state.values() for name, value in state.items()]
        counted["weights"] = sum(local(parameter).nbytes for parameter in module.parameters())
        counted["gradients"] = sum(local(parameter.grad).nbytes for parameter in trained)
        counted["optimizer"] = sum(local(value).nbytes for name, value in moments if name != "step")

    module.on_before_optimizer_step = count
    options = {"max_steps": 2, "strategy": named_strategy(strategy), "devices": devices}
    tiny_fit(model, log, module=module, trainer_options=options)
    return counted


@pytest.mark.parametrize(("strategy", "lora_r"), [("fsdp2", 0), ("fsdp2", 4), ("ddp", 4)])
def test_weights_gradients_and_moments_are_those_of_a_trained_model(strategy: Any, lora_r: int, tmp_path: Path) -> None:
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl", num_rows=32)
    measured = finish(start(partial(bytes_of_run, model, log, lora_r, strategy, 2), ranks=2, folder=tmp_path), tmp_path)
    plan = memory_of(PlanOptions(model, 2, strategy, lora_r, "float32", "32-true"))
    assert [plan[part] for part in ALWAYS] == [pytest.approx(measured[0][part], rel=0.02) for part in ALWAYS]


# --- what comes and goes


class LiveInStep(LiveBytes):
    """Counts what a step makes, without views of tensors that were there before."""

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._before = {tensor.untyped_storage().data_ptr() for tensor in before}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        peak, made = self.peak, super().__torch_dispatch__(function, types, args, kwargs)
        self._made = {place: kept for place, kept in self._made.items() if place not in self._before}
        self.peak = max(peak, sum(size for _, size in self._made.values()))
        return made


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("planned")
    config = LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=896, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("lora_r", "dtype", "precision", "gradient_checkpointing"),
    [
        (0, "float32", "32-true", False),
        (0, "float32", "bf16-mixed", True),
        (8, "bfloat16", "32-true", False),
        (8, "bfloat16", "32-true", True),
        (8, "float32", "32-true", False),
    ],
)
def test_what_comes_and_goes_is_what_is_alive_in_a_step(
    lora_r: int, dtype: Any, precision: Any, gradient_checkpointing: bool, model_folder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(fused_layers, "_CPU_ROWS", 10**9)
    monkeypatch.setattr(log_probs, "tile_for", lambda _: (256, 512))
    plan, peak, _ = planned_and_found(model_folder, lora_r, dtype, precision, gradient_checkpointing)
    assert sum(size for part, size in plan.items() if part not in ALWAYS) == pytest.approx(peak, rel=0.15)


def planned_and_found(
    model: str, lora_r: int, dtype: Any, precision: Any, gradient_checkpointing: bool
) -> tuple[dict[str, float], int, int]:
    """A plan, the most bytes alive in a step, and bytes of what is trained."""
    options = PlanOptions(
        model, 1, "ddp", lora_r, dtype, precision, max_length=1200, completion_tokens=200,
        gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    lora = LoraSettings(r=lora_r) if lora_r else None
    policy: Any = BCOModule(model, lora=lora, dtype=dtype).policy
    if gradient_checkpointing:  # as a run does before its first step
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        policy.enable_input_require_grads()
        policy.train()
    batch = make_batch(2000, [(1000, 200)])

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = completion_log_probs(policy, batch).sum()
        loss.backward()

    trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    for parameter in trainable:  # as from the second micro-batch on
        parameter.grad = torch.zeros_like(parameter)
    with LiveInStep([*policy.parameters(), *(parameter.grad for parameter in trainable)]) as live:
        step()
    trained = sum(parameter.nbytes for parameter in policy.parameters() if parameter.requires_grad)
    return memory_of(options, tile=(256, 512)), live.peak, trained


def test_of_a_mixture_all_experts_are_stored_and_those_of_a_token_are_active(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_probs, "tile_for", lambda _: (256, 512))
    config = Qwen3MoeConfig(
        vocab_size=2000, hidden_size=128, moe_intermediate_size=96, intermediate_size=448, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=16, num_experts_per_tok=4,
        mlp_only_layers=[0],
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    plan, peak, trained = planned_and_found(str(tmp_path), 8, "float32", "32-true", False)
    assert plan["gradients"] == trained
    assert plan["weights"] == trained + sum(parameter.nbytes for parameter in model.parameters())
    assert sum(size for part, size in plan.items() if part not in ALWAYS) == pytest.approx(peak, rel=0.15)
    attention, dense = 128 * 32 * (4 + 2 + 2 + 4), 3 * 128 * 448
    met = 3 * attention + dense + 2 * (4 * 3 * 128 * 96 + 16 * 128)  # of the experts four, and their router
    assert UsefulFlops.of(model).per_token == 6 * met


# --- how parts go with settings


def test_parts_are_cut_halved_and_doubled_as_they_should() -> None:
    ddp, cut = (memory_of(PlanOptions("8B", 8, strategy)) for strategy in ("ddp", "fsdp2"))
    assert ddp["weights"] == 8_030_261_248 * 4
    assert [cut[part] for part in ALWAYS] == [pytest.approx(ddp[part] / 8, rel=1e-3) for part in ALWAYS]
    assert not ddp["gathered weights"]
    assert cut["gathered weights"]
    assert memory_of(PlanOptions("8B", 8, "fsdp")) == cut  # two names of one engine
    eight_bits = memory_of(PlanOptions("8B", 8, optimizer="adamw_8bit"))
    assert eight_bits["optimizer"] == pytest.approx(cut["optimizer"] / 4, rel=0.02)
    assert memory_of(PlanOptions("8B", 8, reference="model"))["reference"] == cut["weights"]
    lora = memory_of(PlanOptions("8B", 8, lora_r=16, gradient_checkpointing=True))
    states = 33 * 4096 * 4096 * 2  # of layers and the last norm, tokens, hidden size, bfloat16
    assert states < lora["activations"] < 2.2 * states


def test_8b_in_full_fits_on_one_card_in_bfloat16() -> None:
    bfloat16: Any = {"dtype": "bfloat16", "precision": "32-true", "optimizer": "adamw_bf16"}
    plan = memory_of(PlanOptions("8B", gradient_checkpointing=True, **bfloat16))
    assert plan["weights"] == plan["gradients"] == plan["optimizer"] / 2 == 8_030_261_248 * 2
    assert sum(plan.values()) < 72 * 2**30
    assert sum(memory_of(PlanOptions("8B", gradient_checkpointing=True)).values()) > 120 * 2**30
    mixed, selected, kept = (
        memory_of(PlanOptions("8B", gradient_checkpointing=how))["activations"] for how in (True, "selective", False)
    )
    assert mixed < selected < 0.8 * kept


# --- the command


def test_the_command_says_whether_a_model_fits(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["plan", "--model", "8B", "--gpus", "8", "--gradient_checkpointing"]
    assert main(options) == 0
    assert "fits into 80 GiB" in " ".join(capsys.readouterr().out.split())
    assert main([*options, "--gpu_memory", "16"]) == 0
    assert "DOES NOT FIT into 16 GiB" in " ".join(capsys.readouterr().out.split())


def test_the_table_of_the_recipes_is_what_the_formula_gives() -> None:
    assert scale_table() in (CONFIGS.parent / "docs" / "many_gpus.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--model: expected a model, found none."),
        (["--model", "8B", "--gpus", "0"], "Not of type PositiveInt: 0"),
        (["--model", "8B", "--strategy", "zero"], ", found zero."),
        (["--model", "8B", "--gpuss", "8"], "nearest are gpus, "),
        (["--model", "8B", "--completion_tokens", "4096"], "--completion_tokens: expected fewer than --max_length"),
        (["--model", "./nothing"], "./nothing: expected a model folder or .gguf file, found nothing there."),
    ],
)
def test_options_that_make_no_sense_are_named(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_model_of_other_layers_is_refused(tmp_path: Path) -> None:
    GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=97).save_pretrained(tmp_path)
    with pytest.raises(LanguageModelError, match="expected decoder layers with q_proj"):
        memory_of(PlanOptions(str(tmp_path)))
