"""Checkpoints that two processes write in parts: whole or not there, refused when damaged, alike in every process."""

from __future__ import annotations

import os
import resource
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule
from transformers import LlamaForCausalLM

from bco_lightning import BCOModule, FeedbackDataModule, LoraSettings
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.checkpointing import read_checkpoint, saved_steps, verify_checkpoint
from bco_lightning.errors import CheckpointError, UserError
from bco_lightning.identity import digest_of_tensors
from bco_lightning.shards import put_shards
from bco_lightning.strategies import FSDP1Strategy, FSDP2Strategy, named_strategy
from tests.distributed.runs import TORCHRUN
from tests.reliability.tiny_run import assert_same, finish, make_log, make_model, start, tiny_fit


class Saving(RunCheckpoint):
    """In one process files may not grow beyond a limit at step 4, as on a full disk."""

    def __init__(self, full_in: int | None, **options: Any) -> None:
        super().__init__(every_n_steps=2, keep=9, **options)
        self.full_in = full_in

    def _save(self, trainer: Any) -> None:
        if trainer.global_step == 4 and trainer.global_rank == self.full_in:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        super()._save(trainer)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def fit(
    model: str, log: str, strategy: str, *, full_in: int | None = None, if_saving_fails: str = "stop", **more: Any
) -> dict[str, Any]:
    module_options = more.pop("module_options", {})
    saving = Saving(full_in, if_saving_fails=if_saving_fails)
    saving.run_folder = "run"
    options = {"devices": int(os.environ.get("WORLD_SIZE", "1")), "strategy": named_strategy(strategy), "max_steps": 6}
    try:
        return tiny_fit(
            model,
            log,
            callbacks=[saving],
            trainer_options={**options, **more.pop("trainer_options", {})},
            module_options=module_options,
            data_options={"batch_size": 4},
            **more,
        )
    except UserError as error:
        return {"error": str(error)}


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    return make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl")


@pytest.mark.parametrize(
    ("strategy", "full_in", "if_saving_fails"),
    [("fsdp2", 0, "stop"), ("fsdp2", 1, "stop"), ("fsdp2", 1, "warn"), ("fsdp", 1, "stop")],
)
def test_a_disk_that_is_full_for_one_process_ends_all_with_one_error(
    strategy: str, full_in: int, if_saving_fails: str, files: tuple[str, str], tmp_path: Path
) -> None:
    run = partial(fit, *files, strategy, full_in=full_in, if_saving_fails=if_saving_fails)
    told = finish(start(run, ranks=2, folder=tmp_path), tmp_path, timeout=60)
    checkpoints = tmp_path / "run" / "checkpoints"
    steps = [int(step.name.removeprefix("step-")) for step in saved_steps(checkpoints)]
    assert all(verify_checkpoint(step) for step in saved_steps(checkpoints))
    assert not list(checkpoints.glob(".*"))
    if if_saving_fails == "stop":
        assert steps == [2]
        assert all(
            "step-00000004: expected to write a checkpoint, found that File too large" in one["error"] for one in told
        )
    else:
        assert steps == [2, 6]
        assert all(one["step"] == 6 for one in told)


def test_a_damaged_part_is_refused_by_name(files: tuple[str, str], tmp_path: Path) -> None:
    finish(start(partial(fit, *files, "fsdp2"), ranks=2, folder=tmp_path), tmp_path)
    newest = saved_steps(tmp_path / "run" / "checkpoints")[-1]
    parts = sorted(newest.glob("*.safetensors"))
    assert len(parts) == 2
    for damage in ("flip", "cut", "delete"):
        for part in parts:
            whole = part.read_bytes()
            if damage == "delete":
                part.unlink()
            else:
                changed = bytearray(whole)
                changed[-1] ^= 1
                part.write_bytes(changed if damage == "flip" else whole[:-1])
            with pytest.raises(CheckpointError, match=part.name):
                read_checkpoint(str(newest))
            part.write_bytes(whole)
    assert read_checkpoint(str(newest))["state_dict"]


def test_a_part_that_is_not_the_checkpoints_own_is_refused(files: tuple[str, str], tmp_path: Path) -> None:
    finish(start(partial(fit, *files, "fsdp2"), ranks=2, folder=tmp_path), tmp_path)
    older, newest = saved_steps(tmp_path / "run" / "checkpoints")[-2:]
    part = sorted(older.glob("*.safetensors"))[0]
    (newest / "zz.safetensors").write_bytes(part.read_bytes())
    with pytest.raises(CheckpointError, match=r"zz.safetensors: expected the checkpoint's own files"):
        read_checkpoint(str(newest))


def go_on_from_the_newest(model: str, log: str, folder: str, may_fall_back: bool) -> dict[str, Any]:
    strategy = FSDP2Strategy()
    strategy.may_fall_back = may_fall_back
    return fit(model, log, "auto", ckpt_path=folder, trainer_options={"strategy": strategy})


def test_a_damaged_step_that_was_not_asked_for_by_name_is_passed_over_by_all(
    files: tuple[str, str], tmp_path: Path
) -> None:
    through = finish(start(partial(fit, *files, "fsdp2"), ranks=2, folder=tmp_path), tmp_path)
    step = tmp_path / "run" / "checkpoints" / "step-00000004"
    part = sorted(step.glob("*.safetensors"))[1]  # verified by the second process
    changed = bytearray(part.read_bytes())
    changed[-1] ^= 1
    part.write_bytes(changed)
    again = partial(go_on_from_the_newest, *files, str(step))
    passed = finish(start(partial(again, True), ranks=2, folder=tmp_path / "a"), tmp_path / "a")
    assert_same(passed[0]["weights"], through[0]["weights"])
    assert min(passed[0]["rows"]) == 2
    refused = finish(start(partial(again, False), ranks=2, folder=tmp_path / "b"), tmp_path / "b")
    assert all(part.name in one["error"] for one in refused)


def test_a_run_goes_on_to_the_bit_from_parts(files: tuple[str, str], tmp_path: Path) -> None:
    """As the weights were, so were moments, shift and random numbers."""
    through = finish(start(partial(fit, *files, "fsdp2"), ranks=2, folder=tmp_path), tmp_path)
    source = tmp_path / "run" / "checkpoints" / "step-00000004"
    again = partial(fit, *files, "fsdp2", ckpt_path=str(source))
    resumed = finish(start(again, ranks=2, folder=tmp_path / "again"), tmp_path / "again")
    for name in ("weights", "moments", "learning_rate", "shift", "random"):
        assert_same(resumed[0][name], through[0][name], name)


def fit_apart(model: str, log: str) -> dict[str, Any]:
    """As on two nodes that have a folder each."""
    own = Path(f"node{os.environ['RANK']}")
    own.mkdir()
    os.chdir(own)
    return fit(model, log, "fsdp2")


def test_processes_that_do_not_see_one_folder_end_before_the_first_step(files: tuple[str, str], tmp_path: Path) -> None:
    told = finish(start(partial(fit_apart, *files), ranks=2, folder=tmp_path), tmp_path)
    assert all("expected a folder that all processes see, found that 1 of 2 do not" in one["error"] for one in told)
    assert not list(tmp_path.glob("node*/run/checkpoints/*"))


def go_on_apart(model: str, log: str, folder: str) -> dict[str, Any]:
    steps = {"0": "step-00000002", "1": "step-00000004"}
    return fit(model, log, "ddp", ckpt_path=f"{folder}/{steps[os.environ['RANK']]}")


def test_processes_that_would_go_on_from_different_steps_are_stopped(files: tuple[str, str], tmp_path: Path) -> None:
    finish(start(partial(fit, *files, "ddp"), ranks=2, folder=tmp_path), tmp_path)
    run = partial(go_on_apart, *files, str(tmp_path / "run" / "checkpoints"))
    told = finish(start(run, ranks=2, folder=tmp_path / "again"), tmp_path / "again")
    said = "expected one step for all processes to go on from, found 2, 4"
    assert all(said in one["error"] for one in told)


def test_tensors_that_belong_nowhere_are_refused() -> None:
    checkpoint: dict[str, Any] = {"state_dict": {}, "optimizer_states": [{"state": {}}]}
    for key in ("optimizer_states/1/0/exp_avg", "optimizer_states/x/0/exp_avg", "optimizer_states/0", "else"):
        with pytest.raises(CheckpointError, match="expected a tensor of its own"):
            put_shards(checkpoint, {key: torch.zeros(1)})


@pytest.mark.parametrize(
    ("strategy", "trainer_options", "module_options", "words"),
    [
        (
            "fsdp",
            {},
            {"lora": LoraSettings(), "dtype": "bfloat16"},
            "model.dtype: expected float32 for adapters under fsdp",
        ),
        (
            "fsdp_cpu_offload",
            {"accumulate_grad_batches": 2},
            {},
            "trainer.accumulate_grad_batches: expected 1 under fsdp_cpu_offload",
        ),
        ("fsdp2", {"precision": "64-true"}, {}, "trainer.precision: expected 32-true or bf16-mixed"),
        ("fsdp2", {}, {"optimizer": "adamw_8bit"}, "model.optimizer: expected adamw for weights that are cut up"),
    ],
)
def test_what_a_sharded_strategy_cannot_do_is_refused(
    strategy: str,
    trainer_options: dict[str, Any],
    module_options: dict[str, Any],
    words: str,
    files: tuple[str, str],
    tmp_path: Path,
) -> None:
    run = partial(fit, *files, strategy, trainer_options=trainer_options, module_options=module_options)
    told = finish(start(run, ranks=2, folder=tmp_path), tmp_path)
    assert all(words in one["error"] for one in told)


def fit_with_one_row_of_adapters(model: str, log: str) -> dict[str, Any]:
    return fit(model, log, "fsdp2", module_options={"lora": LoraSettings(r=1), "dtype": "float32"})


def test_a_tensor_with_fewer_rows_than_processes_trains(files: tuple[str, str], tmp_path: Path) -> None:
    told = finish(start(partial(fit_with_one_row_of_adapters, *files), ranks=2, folder=tmp_path), tmp_path)
    assert all(one["step"] == 6 for one in told)


def validate_then_fit(model: str, log: str, strategy: str) -> dict[str, Any]:
    module = BCOModule(model, dtype="float32", learning_rate=1e-2, reference_log_probs="online")
    data = FeedbackDataModule(log, validation_files=log, batch_size=4, max_length=96)
    quiet = {"enable_checkpointing": False, "logger": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(devices=2, strategy=named_strategy(strategy), use_distributed_sampler=False, **quiet).validate(module, data)
    return {"digest": fit(model, log, strategy, module=module), "reference": module.fingerprints()["reference"]}


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_a_module_that_was_validated_trains_with_the_same_reference(
    strategy: str, files: tuple[str, str], tmp_path: Path
) -> None:
    run = partial(validate_then_fit, *files, strategy)
    told = finish(start(run, ranks=2, folder=tmp_path, environment=TORCHRUN), tmp_path)
    alone = BCOModule(files[0], dtype="float32")
    assert {one["reference"] for one in told} == {digest_of_tensors(alone.policy.named_parameters())}


def fit_without_names(model: str, log: str) -> dict[str, Any]:
    LlamaForCausalLM._no_split_modules = None
    strategy = FSDP2Strategy()
    found = fit(model, log, "auto", trainer_options={"strategy": strategy})
    policy = strategy.lightning_module.policy  # type: ignore[union-attr]
    return {**found, "units": sum(isinstance(module, FSDPModule) for module in policy.modules())}


def test_decoder_layers_are_found_where_a_model_does_not_name_them(files: tuple[str, str], tmp_path: Path) -> None:
    told = finish(start(partial(fit_without_names, *files), ranks=2, folder=tmp_path), tmp_path)
    assert all(one["units"] == 3 for one in told)  # two layers and what is left


def fit_by_lightning(model: str, log: str) -> dict[str, Any]:
    return fit(model, log, "auto", trainer_options={"strategy": ModelParallelStrategy(2, 1)})


def test_lightnings_own_sharding_is_refused(files: tuple[str, str], tmp_path: Path) -> None:
    told = finish(start(partial(fit_by_lightning, *files), ranks=2, folder=tmp_path), tmp_path)
    assert all("expected one of this package, found Lightning's ModelParallelStrategy" in one["error"] for one in told)


def fit_in_groups(model: str, log: str, group: int) -> dict[str, Any]:
    module = BCOModule(model, learning_rate=1e-2, dtype="float32")
    strategy = FSDP2Strategy(group=group)
    options = {"devices": int(os.environ["WORLD_SIZE"]), "strategy": strategy, "max_steps": 3}
    try:
        found = tiny_fit(model, log, module=module, trainer_options=options, data_options={"batch_size": 2})
    except UserError as error:
        return {"error": str(error)}
    return {"weights": found["weights"], "shape": tuple(strategy.sharding.mesh.shape), "shift": found["shift"]}


def test_copies_of_the_weights_that_are_each_cut_up_give_the_same_numbers(
    files: tuple[str, str], tmp_path: Path
) -> None:
    everywhere = finish(start(partial(fit_in_groups, *files, 4), ranks=4, folder=tmp_path / "4"), tmp_path / "4")
    in_pairs = finish(start(partial(fit_in_groups, *files, 2), ranks=4, folder=tmp_path / "2"), tmp_path / "2")
    assert everywhere[0]["shape"] == (4,)
    assert in_pairs[0]["shape"] == (2, 2)
    for name, weight in everywhere[0]["weights"].items():
        assert torch.allclose(in_pairs[0]["weights"][name], weight, rtol=1e-5, atol=1e-6), name
    refused = finish(start(partial(fit_in_groups, *files, 3), ranks=4, folder=tmp_path / "3"), tmp_path / "3")
    assert all("trainer.strategy.group: expected a divisor of 4 processes, found 3" in one["error"] for one in refused)


def test_fsdp_is_an_object_where_lightning_refuses_its_name() -> None:
    assert isinstance(named_strategy("fsdp"), FSDP1Strategy)
    assert named_strategy("fsdp2") == "fsdp2"
