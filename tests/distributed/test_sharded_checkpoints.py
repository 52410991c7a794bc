"""Checkpoints that two processes write in parts: whole or not there, refused when damaged, alike in every process."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from bco_lightning import BCOModule, FeedbackDataModule, LoraSettings
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.checkpoints.folders import saved_steps
from bco_lightning.checkpoints.format import VerifiedCheckpointIO, read_checkpoint
from bco_lightning.checkpoints.manifest import verify_checkpoint
from bco_lightning.errors import CheckpointError, ConfigError, UserError
from bco_lightning.identity import digest_of_tensors
from bco_lightning.parallel.sharding import device_of
from bco_lightning.parallel.strategy import FSDP2Strategy, named_strategy, refuse_unknown
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
    model: str, log: str, strategy: Any = "fsdp2", *, full_in: int | None = None, if_saving_fails: str = "stop",
    folder: str = "run", **more: Any,
) -> dict[str, Any]:  # fmt: skip
    saving = Saving(full_in, if_saving_fails=if_saving_fails)
    saving.run_folder = folder
    options = {"devices": int(os.environ.get("WORLD_SIZE", "1")), "strategy": strategy, "max_steps": 6}
    try:
        return tiny_fit(
            model,
            log,
            callbacks=[saving],
            trainer_options={**options, **more.pop("trainer_options", {})},
            data_options={"batch_size": 4},
            **more,
        )
    except UserError as error:
        return {"error": str(error)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("files")
    return make_model(folder / "model"), make_log(folder / "log.jsonl")


@pytest.fixture(scope="module")
def through(files: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of two processes: its checkpoints at steps 2, 4 and 6, and what it ended with."""
    folder = tmp_path_factory.mktemp("through")
    first, _ = finish(start(partial(fit, *files), ranks=2, folder=folder), folder)
    return folder / "run" / "checkpoints", first


@pytest.fixture
def checkpoints(through: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of them, to be damaged."""
    return shutil.copytree(through[0], tmp_path / "checkpoints")


@pytest.mark.parametrize(("full_in", "if_saving_fails"), [(0, "stop"), (1, "stop"), (1, "warn")])
def test_a_disk_that_is_full_for_one_process_is_told_to_all(
    full_in: int, if_saving_fails: str, files: tuple[str, str], tmp_path: Path
) -> None:
    run = partial(fit, *files, full_in=full_in, if_saving_fails=if_saving_fails)
    told = finish(start(run, ranks=2, folder=tmp_path), tmp_path, timeout=60)
    steps = saved_steps(tmp_path / "run" / "checkpoints")
    assert all(verify_checkpoint(step) for step in steps)
    assert sorted((tmp_path / "run" / "checkpoints").iterdir()) == steps
    if if_saving_fails == "stop":
        assert [step.name for step in steps] == ["step-00000002"]
        said = "step-00000004: expected to write a checkpoint, found that File too large"
        assert all(said in one["error"] for one in told)
    else:
        assert [step.name for step in steps] == ["step-00000002", "step-00000006"]
        assert all(one["step"] == 6 for one in told)


def test_a_damaged_part_is_refused_by_name(checkpoints: Path) -> None:
    newest = saved_steps(checkpoints)[-1]
    parts = sorted(newest.glob("*.safetensors"))
    assert len(parts) == 2
    for damage in ("flip", "cut", "delete"):
        for part in parts:
            whole = part.read_bytes()
            if damage == "delete":
                part.unlink()
            else:
                part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) * (damage == "flip"))
            with pytest.raises(CheckpointError, match=part.name):
                read_checkpoint(newest)
            part.write_bytes(whole)
    assert read_checkpoint(newest)["state_dict"]


def test_a_part_that_is_not_the_checkpoints_own_is_refused(checkpoints: Path) -> None:
    older, newest = saved_steps(checkpoints)[-2:]
    shutil.copy(next(older.glob("*.safetensors")), newest / "zz.safetensors")
    with pytest.raises(CheckpointError, match=r"zz.safetensors: expected the checkpoint's own files"):
        read_checkpoint(newest)


def go_on(model: str, log: str, whole: str, damaged: str) -> list[dict[str, Any]]:
    """From a whole step, and from a damaged one that was and was not asked for by its name."""
    found = [fit(model, log, ckpt_path=whole, folder="whole")]
    for may_fall_back in (False, True):
        strategy = FSDP2Strategy()
        strategy.checkpoint_io = VerifiedCheckpointIO(may_fall_back)
        found.append(fit(model, log, strategy, ckpt_path=damaged, folder=f"damaged {may_fall_back}"))
    return found


def test_a_run_goes_on_from_parts_to_the_bit_and_past_a_damaged_one(
    files: tuple[str, str], through: tuple[Path, dict[str, Any]], checkpoints: Path, tmp_path: Path
) -> None:
    """As the weights were, so were moments, shift and random numbers."""
    ended = through[1]
    second = sorted((checkpoints / "step-00000004").glob("*.safetensors"))[1]  # verified by the second process
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    run = partial(go_on, *files, str(through[0] / "step-00000004"), str(second.parent))
    for resumed, refused, passed in finish(start(run, ranks=2, folder=tmp_path, environment=TORCHRUN), tmp_path):
        for name in ("weights", "moments", "learning_rate", "shift"):
            assert_same(resumed[name], ended[name], name)
        assert second.name in refused["error"]
        assert_same(passed["weights"], ended["weights"])
        assert min(passed["rows"]) == 2


def fit_apart(model: str, log: str) -> dict[str, Any]:
    """As on two nodes that have a folder each."""
    own = Path(f"node{os.environ['RANK']}")
    own.mkdir()
    os.chdir(own)
    return fit(model, log)


def test_processes_that_do_not_see_one_folder_end_before_the_first_step(files: tuple[str, str], tmp_path: Path) -> None:
    told = finish(start(partial(fit_apart, *files), ranks=2, folder=tmp_path), tmp_path)
    assert all("expected a folder that all processes see, found that 1 of 2 do not" in one["error"] for one in told)
    assert not list(tmp_path.glob("node*/run/checkpoints/*"))


def go_on_apart(model: str, log: str, folder: str) -> dict[str, Any]:
    steps = {"0": "step-00000002", "1": "step-00000004"}
    return fit(model, log, "ddp", ckpt_path=f"{folder}/{steps[os.environ['RANK']]}")


def test_processes_that_would_go_on_from_different_steps_are_stopped(
    files: tuple[str, str], checkpoints: Path, tmp_path: Path
) -> None:
    told = finish(start(partial(go_on_apart, *files, str(checkpoints)), ranks=2, folder=tmp_path), tmp_path)
    said = "expected one step for all processes to go on from, found 2, 4"
    assert all(said in one["error"] for one in told)


def odd_runs(model: str, log: str) -> dict[str, Any]:
    """Runs that are refused, and unusual ones that are not."""
    found: dict[str, Any] = {
        "precision": fit(model, log, trainer_options={"precision": "64-true"}),
        "optimizer": fit(model, log, module_options={"optimizer": "adamw_8bit"}),
        "Lightning's own": fit(model, log, ModelParallelStrategy(2, 1)),
        "one row": fit(model, log, folder="r1", module_options={"lora": LoraSettings(r=1), "dtype": "float32"}),
    }
    module = BCOModule(model, dtype="float32", learning_rate=1e-2, reference_log_probs="online")
    data = FeedbackDataModule(log, validation_files=log, batch_size=4, max_length=96)
    quiet: dict[str, Any] = {"enable_checkpointing": False, "logger": False, "enable_model_summary": False}
    Trainer(devices=2, accelerator="cpu", strategy="fsdp2", use_distributed_sampler=False, **quiet).validate(
        module, data
    )
    found["validated"] = fit(model, log, folder="validated", module=module)
    found["reference"] = module.fingerprints()["reference"]
    LlamaForCausalLM._no_split_modules = None
    strategy = FSDP2Strategy()
    found["unnamed"] = fit(model, log, strategy, folder="unnamed")
    policy: Any = strategy.lightning_module.policy  # type: ignore[union-attr]
    found["units"] = sum(isinstance(module, FSDPModule) for module in policy.modules())
    return found


def test_what_a_sharded_strategy_cannot_do_is_refused_and_the_unusual_trains(
    files: tuple[str, str], tmp_path: Path
) -> None:
    run = partial(odd_runs, *files)
    for found in finish(start(run, ranks=2, folder=tmp_path, environment=TORCHRUN), tmp_path):
        assert "trainer.precision: expected 32-true or bf16-mixed" in found["precision"]["error"]
        assert (
            "model.optimizer: expected adamw or adamw_bf16 for weights that are cut up" in found["optimizer"]["error"]
        )
        said = "trainer.strategy: expected one of this package, found Lightning's ModelParallelStrategy"
        assert said in found["Lightning's own"]["error"]
        for name in ("one row", "validated", "unnamed"):  # fewer rows in a tensor than processes is one of them
            assert found[name]["step"] == 6, name
        assert found["reference"] == digest_of_tensors(BCOModule(files[0], dtype="float32").policy.named_parameters())
        assert found["units"] == 3  # two layers, which the model does not name, and what is left


def test_fsdp_is_a_name_of_fsdp2_and_lightnings_own_is_refused() -> None:
    assert named_strategy("fsdp") == "fsdp2"
    assert named_strategy("fsdp_cpu_offload") == "fsdp2_cpu_offload"
    with pytest.raises(ConfigError, match=r"found Lightning's FSDPStrategy\. Use fsdp2"):
        refuse_unknown(FSDPStrategy(), "32-true")


def test_a_gpu_that_only_emulates_bfloat16_is_remarked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.warns(match=r"emulates bfloat16, slowly\. Set trainer\.precision: 16-mixed"):
        refuse_unknown(DDPStrategy(accelerator=CUDAAccelerator()), "bf16-mixed")


def test_a_model_computes_on_the_devices_of_its_mesh_wherever_its_parts_are_kept() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Linear(2, 2, device="meta")
        part = DTensor.from_local(model.weight, init_device_mesh("cpu", (1,)))
        model.weight = torch.nn.Parameter(part)
        assert model.weight.device.type == "meta"
        assert device_of(model).type == "cpu"
        assert device_of(torch.nn.Linear(2, 2, device="meta")).type == "meta"
    finally:
        torch.distributed.destroy_process_group()


def fit_in_groups(model: str, log: str) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for group in (4, 2, 3):
        module, strategy = BCOModule(model, learning_rate=1e-2, dtype="float32"), FSDP2Strategy(group=group)
        options = {"devices": 4, "strategy": strategy, "max_steps": 3}
        try:
            ended = tiny_fit(model, log, module=module, trainer_options=options, data_options={"batch_size": 2})
            found[group] = {"weights": ended["weights"], "shape": tuple(strategy.sharding.mesh.shape)}
        except UserError as error:
            found[group] = str(error)
    return found


def test_copies_of_the_weights_that_are_each_cut_up_give_the_same_numbers(
    files: tuple[str, str], tmp_path: Path
) -> None:
    environment = {**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}
    run = start(partial(fit_in_groups, *files), ranks=4, folder=tmp_path, environment=environment)
    found = finish(run, tmp_path)[0]
    assert (found[4]["shape"], found[2]["shape"]) == ((4,), (2, 2))
    for name, weight in found[4]["weights"].items():
        assert torch.allclose(found[2]["weights"][name], weight, rtol=1e-5, atol=1e-6), name
    assert "trainer.strategy.group: expected a divisor of 4 processes, found 3" in found[3]
