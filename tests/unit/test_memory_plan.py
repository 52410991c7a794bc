"""Plans agree with published sizes, with the tensors of trained models, and with what is alive in a step, within 10 %.

GPUs compute norms and feed-forward layers in one piece, and so do these measurements; nothing here was measured on one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from bco_lightning import BCOModule
from bco_lightning.cli import app as cli
from bco_lightning.errors import ConfigError, LanguageModelError
from bco_lightning.models import fused_layers
from bco_lightning.models.layout import causal_lm_of
from bco_lightning.models.log_probs import Tile, completion_log_probs, token_log_probs
from bco_lightning.options import LoraSettings
from bco_lightning.parallel.sharding import Sharding, make_mesh, shard
from bco_lightning.parallel.strategy import named_strategy
from bco_lightning.planning.memory_plan import MemoryPlan, MemorySettings, head_memory, plan_memory
from bco_lightning.planning.model_shape import NAMED_SHAPES, shape_of, shape_of_model
from tests.conftest import REAL_MODEL
from tests.reliability.tiny_run import byte_tokenizer, finish, make_log, make_model, start, tiny_fit
from tests.unit.test_log_probs import LiveBytes, make_batch

TILE = Tile(256, 512)
PROMPT, COMPLETION = 1000, 200  # longer than packed_attention's _LONG: its quick gradient is for CPUs alone


def near(measured: float) -> Any:
    return pytest.approx(measured, rel=0.1)


# --- parameters


@pytest.mark.parametrize(
    ("name", "published"), [("8B", 8_030_261_248), ("70B", 70_553_706_496), ("405B", 405_853_388_800)]
)
def test_named_shapes_have_the_published_number_of_parameters(name: str, published: int) -> None:
    assert shape_of(name).num_parameters == published


@pytest.mark.real_model
def test_a_packaged_gguf_file_is_planned_from_its_header() -> None:
    assert shape_of(REAL_MODEL).num_parameters == 134_515_008


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_transformers_counts_them(tied: bool, tmp_path: Path) -> None:
    model = LlamaForCausalLM(llama_config(tied=tied))
    model.save_pretrained(tmp_path)
    assert shape_of(str(tmp_path)).num_parameters == model.num_parameters()


def test_adapters_are_counted_as_peft_counts_them(model_folder: str) -> None:
    policy: Any = BCOModule(model_folder, lora=LoraSettings(r=8), dtype="float32").policy
    assert shape_of(model_folder).num_adapter_parameters(8) == policy.get_nb_trainable_parameters()[0]


# --- what is there all the time


def bytes_of_run(model: str, log: str, lora_r: int, strategy: str, devices: int) -> dict[str, int]:
    """Trains the tiny run for two steps and counts this process's tensors."""
    module = BCOModule(model, dtype="float32", lora=LoraSettings(r=lora_r) if lora_r else None)
    look = Look()
    options = {"max_steps": 2, "strategy": named_strategy(strategy), "devices": devices}
    tiny_fit(model, log, module=module, callbacks=[look], trainer_options=options)
    return look.bytes


class Look(cli.Callback):
    """Counts this process's tensors before each optimizer step; the last count stays."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        states = optimizer.state.values()
        model = trainer.strategy.model
        # Or there would be a second copy of all gradients.
        assert getattr(model, "gradient_as_bucket_view", True)
        self.bytes = {
            "weights": sum(local(parameter).nbytes for parameter in module.parameters()),
            "gradients": sum(local(parameter.grad).nbytes for parameter in trained),
            "optimizer": sum(
                local(value).nbytes for state in states for name, value in state.items() if name != "step"
            ),
        }


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize(("strategy", "processes"), [("auto", 1), ("fsdp2", 2), ("ddp", 2)])
def test_weights_gradients_and_moments_are_those_of_a_trained_model(
    lora_r: int, strategy: Any, processes: int, tmp_path: Path
) -> None:
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl", num_rows=32)
    run = partial(bytes_of_run, model, log, lora_r, strategy, processes)
    measured = finish(start(run, ranks=processes, folder=tmp_path), tmp_path)[0]
    strategy = "ddp" if strategy == "auto" else strategy
    plan = plan_memory(shape_of(model), MemorySettings(processes, strategy, lora_r, "float32", "32-true"))
    assert plan.weights == near(measured["weights"])
    assert plan.gradients == near(measured["gradients"])
    assert plan.optimizer == near(measured["optimizer"])


# --- what comes and goes


class LiveStorages(LiveBytes):
    """Counts storages at their present size, since FSDP2 empties and fills them, without those that were there before.

    Args:
        before: Tensors that are not counted.
    """

    def __init__(self, before: Any) -> None:
        super().__init__()
        self._before = {local(tensor).untyped_storage()._cdata for tensor in before}
        self._seen: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((made, args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                storage = local(tensor).untyped_storage()
                if storage._cdata not in self._seen:
                    self._seen[storage._cdata] = StorageWeakRef(storage)
        self.peak = max(self.peak, self.now())
        return made

    def now(self) -> int:
        total = 0
        for place, reference in list(self._seen.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self._seen[place]
            elif place not in self._before:
                total += storage.nbytes()
        return total


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor  # type: ignore[no-any-return]


def llama_config(tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=2000,
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
    )


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("planned")
    LlamaForCausalLM(llama_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def peaks(policy: Any, settings: MemorySettings) -> tuple[int, int, int]:
    """Bytes alive after the forward pass, at its peak, and at the peak of the backward pass, of a later micro-batch.

    Weights and gradients are not counted.
    """
    batch = make_batch(2000, [(settings.max_length - settings.completion_tokens, settings.completion_tokens)])

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.is_mixed):
            return completion_log_probs(policy, batch, settings.tile).sum()

    forward().backward()
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    with LiveStorages([*policy.parameters(), *gradients]) as live:
        loss = forward()
        kept, highest, live.peak = live.now(), live.peak, 0
        loss.backward()
    return kept, highest, live.peak


def planned_peak(plan: MemoryPlan, direction: str) -> int:
    return max(moment.total for moment in plan.moments if moment.name.startswith(direction))


def settings_of(kind: str, gradient_checkpointing: bool, **options: Any) -> MemorySettings:
    lora_r, dtype, precision = {
        "full": (0, "float32", "32-true"),
        "full, autocast": (0, "float32", "bf16-mixed"),
        "LoRA": (8, "float32", "32-true"),
        "LoRA, bfloat16": (8, "bfloat16", "32-true"),
        "LoRA, autocast": (8, "float32", "bf16-mixed"),
    }[kind]
    return MemorySettings(
        **{"gpus": 1, "strategy": "ddp", "max_length": PROMPT + COMPLETION, "completion_tokens": COMPLETION, **options},
        lora_r=lora_r,
        dtype=dtype,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        gradient_checkpointing=gradient_checkpointing,
        tile=TILE,
    )


def policy_of(folder: str, settings: MemorySettings) -> Any:
    lora = LoraSettings(r=settings.lora_r) if settings.lora_r else None
    checkpointing = settings.gradient_checkpointing
    return BCOModule(folder, lora=lora, dtype=settings.dtype, gradient_checkpointing=checkpointing).policy


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["full", "full, autocast", "LoRA", "LoRA, bfloat16", "LoRA, autocast"])
def test_activations_are_those_that_are_alive_in_a_step(
    kind: str, gradient_checkpointing: bool, model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_layers, "_CPU_ROWS", 10**9)
    settings, shape = settings_of(kind, gradient_checkpointing), shape_of(model_folder)
    kept, forward, backward = peaks(policy_of(model_folder, settings), settings)
    plan = plan_memory(shape, settings)
    head = next(moment for moment in plan.moments if moment.name == "forward: head")
    # Autocast has thrown its copies away when the forward pass is over; the graph has those that it needs.
    copies = 0 if gradient_checkpointing else head.weight_copies
    assert head.activations + copies + head_memory(shape, settings)[0] == near(kept)
    assert planned_peak(plan, "forward") == near(forward)
    assert planned_peak(plan, "backward") == near(backward)


def fsdp2_peaks(folder: str) -> list[tuple[str, int, int, int, int]]:
    """Of FSDP2 on a few tokens, so that weights and gradients on their way are most of it: measured and planned."""
    fused_layers._CPU_ROWS = 10**9
    distributed.init_process_group("gloo")
    found = []
    for kind, checkpointing in (("full", False), ("full", True), ("LoRA, bfloat16", True), ("LoRA, autocast", False)):
        settings = settings_of(
            kind, checkpointing, gpus=2, strategy="fsdp2", max_length=120, completion_tokens=COMPLETION // 2
        )
        policy: Any = BCOModule(
            folder, lora=LoraSettings(r=settings.lora_r) if settings.lora_r else None, dtype=settings.dtype
        ).policy
        dtype = torch.bfloat16 if settings.is_mixed else None
        shard(causal_lm_of(policy), [], Sharding(make_mesh("cpu", 2), dtype))
        if checkpointing:
            policy.gradient_checkpointing_enable({"use_reentrant": False})
            policy.enable_input_require_grads()
            policy.train()
        _, forward, backward = peaks(policy, settings)
        plan = plan_memory(shape_of(folder), settings)
        found.append((kind, forward, planned_peak(plan, "forward"), backward, planned_peak(plan, "backward")))
    distributed.destroy_process_group()
    return found


def test_what_fsdp2_gathers_is_what_is_alive_in_a_step(model_folder: str, tmp_path: Path) -> None:
    cases = finish(start(partial(fsdp2_peaks, model_folder), ranks=2, folder=tmp_path), tmp_path)[0]
    for kind, forward, planned_forward, backward, planned_backward in cases:
        assert (kind, planned_forward) == (kind, near(forward))
        assert (kind, planned_backward) == (kind, near(backward))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tile", [Tile(256, 512), Tile(4096, 16384)])
def test_the_head_takes_what_its_tiles_take(frozen: bool, tile: Tile, model_folder: str) -> None:
    shape = shape_of(model_folder)
    settings = MemorySettings(1, "ddp", 8 if frozen else 0, "float32", "32-true", completion_tokens=1000, tile=tile)
    states = torch.randn(settings.scored_tokens, shape.hidden, requires_grad=True)
    weight = torch.randn(shape.vocabulary, shape.hidden, requires_grad=not frozen)
    with LiveStorages([states, weight]) as live:
        states_of_layers = states.clone()
        sums = token_log_probs(states_of_layers, torch.arange(settings.scored_tokens), weight, tile=tile).sum()
        if frozen:
            del states_of_layers
        kept, forward, live.peak = live.now(), live.peak, 0
        sums.backward()
    planned = head_memory(shape, settings)
    gradient_in_transit = 0 if frozen else weight.nbytes
    assert planned[0] == near(kept)
    assert planned[1] == near(forward)
    assert planned[2] + gradient_in_transit == near(live.peak)


# --- how parts go with settings


def test_fsdp2_divides_what_ddp_keeps_whole() -> None:
    shape = shape_of("8B")
    whole, eighth = (plan_memory(shape, MemorySettings(8, strategy)) for strategy in ("ddp", "fsdp2"))
    assert whole.weights == shape.num_parameters * 4
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(eighth, part) == pytest.approx(getattr(whole, part) / 8, rel=1e-3)
    assert whole.peak.gathered == 0 < eighth.peak.gathered


def test_fsdp2_cuts_a_tensor_into_no_more_parts_than_it_has_rows() -> None:
    shape = shape_of("8B")
    few, many = (plan_memory(shape, MemorySettings(gpus, lora_r=16)).gradients for gpus in (16, 1024))
    assert few > many > few / 4


def test_moments_of_eight_bits_take_about_a_quarter() -> None:
    shape = shape_of("8B")
    whole, small = (plan_memory(shape, MemorySettings(8, optimizer=name)) for name in ("adamw", "adamw_8bit"))
    assert small.optimizer == pytest.approx(whole.optimizer / 4, rel=0.02)


def test_a_reference_model_takes_its_part_and_its_root_which_stays_whole() -> None:
    shape = shape_of("8B")
    plan = plan_memory(shape, MemorySettings(8, reference="model"))
    assert plan.reference == pytest.approx(plan.weights + 2 * 128_256 * 4096 * 4, rel=1e-3)


def test_offloading_moves_what_is_cut_up_into_host_memory() -> None:
    shape = shape_of("8B")
    here, there = (plan_memory(shape, MemorySettings(8, cpu_offload=offloads)) for offloads in (False, True))
    assert (there.resident, there.host) == (0, here.resident)


def test_gradient_checkpointing_keeps_one_state_a_layer() -> None:
    shape = shape_of("8B")
    plan = plan_memory(shape, MemorySettings(8, lora_r=16, gradient_checkpointing=True))
    states = 33 * 4096 * 4096 * 2  # layers and the last norm, tokens, hidden size, bfloat16
    assert next(m for m in plan.moments if m.name == "backward: head").activations == pytest.approx(states, rel=0.01)


# --- the command


def test_the_command_says_whether_a_model_fits(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["plan", "--model", "8B", "--gpus", "8", "--gradient_checkpointing"]
    assert cli.main(options) == 0
    assert "fits into 80 GiB" in " ".join(capsys.readouterr().out.split())
    assert cli.main([*options, "--gpu_memory", "16"]) == 0
    assert "DOES NOT FIT into 16 GiB" in " ".join(capsys.readouterr().out.split())


def test_the_table_has_a_line_for_each_shape_kind_and_number_of_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--table"]) == 0
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(tuple(f"| {n}" for n in NAMED_SHAPES))
    ]
    assert len(lines) == 3 * 2 * 4
    assert all(line.count("|") == lines[0].count("|") for line in lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--model: expected a model, found none."),
        (["--model", "8B", "--gpus", "0"], "--gpus: expected a whole number above 0, found 0."),
        (["--model", "8B", "--lora_r", "-1"], "--lora_r: expected a rank"),
        (["--model", "8B", "--gpu_memory", "0"], "--gpu_memory: expected GiB above 0, found 0."),
        (["--model", "8B", "--completion_tokens", "4096"], "--completion_tokens: expected fewer than --max_length"),
        (["--model", "8B", "--cpu_offload", "--strategy", "ddp"], "--cpu_offload: expected fsdp or fsdp2, found ddp"),
        (["--model", "8B", "--strategy", "fsdp", "--lora_r", "8", "--dtype", "bfloat16"], "--dtype: expected float32"),
        (["--model", "./nothing"], "./nothing: expected a model folder or .gguf file, found nothing there."),
    ],
)
def test_options_that_make_no_sense_are_named(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_model_of_other_layers_is_refused(tmp_path: Path) -> None:
    GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=97).save_pretrained(tmp_path)
    with pytest.raises(LanguageModelError, match="expected decoder layers of q_proj"):
        shape_of(str(tmp_path))


def test_a_setting_of_no_known_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="--strategy: expected one of ddp, fsdp, fsdp2, found 'zero'"):
        MemorySettings(strategy="zero")  # type: ignore[arg-type]


def test_a_model_can_be_planned_from_memory() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config())
    assert shape_of_model(model, "mine").num_parameters == model.num_parameters()
