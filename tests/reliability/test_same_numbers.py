"""The same numbers: for any cut of a step, for a seed, for the reference and the metrics, and a golden trajectory."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM

from bco_lightning import BCOModule, LoraSettings
from bco_lightning.callbacks import RunCheckpoint
from bco_lightning.serving.export import export_checkpoint
from tests.reliability.tiny_run import (
    ROWS_PER_STEP,
    STEPS,
    Recorder,
    assert_same,
    finish,
    make_log,
    start,
    tiny_fit,
    whole,
)
from tests.trials import Trials

GOLDEN = Path(__file__).parent / "golden.json"


class Trajectory(Callback):
    """Sums of the losses of a step's rows, and the norm of its gradient before it is clipped."""

    def __init__(self) -> None:
        self.sums: list[tuple[float, float]] = []
        self.norms: list[float] = []
        self.reference: list[str] = []
        self.rows: list[dict[str, list[float]]] = []
        self._step = 0

    def on_fit_start(self, trainer: Any, module: BCOModule) -> None:
        self.reference.append(digest(module))

    def on_before_optimizer_step(self, trainer: Any, module: BCOModule, optimizer: Any) -> None:
        gradients = [whole(p.grad).double().norm() for p in module.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(gradients).norm()))

    def on_train_batch_end(self, trainer: Any, module: BCOModule, *_: Any) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        joined = {
            name: torch.cat([getattr(rows, f"{name}_B") for rows in module.step_rows]).tolist()
            for name in ("thumbs_up", "policy_log_probs", "reference_log_probs", "completion_lengths", "losses")
        }
        joined["reward_shift"] = [module.reward_shift.value]
        self.rows.append(joined)
        weights = [1.5 if up else 3.0 for up in joined["thumbs_up"]]
        weighted = [w * loss for w, loss in zip(weights, joined["losses"], strict=True)]
        self.sums.append((math.fsum(weighted), float(len(weighted))))

    def on_train_end(self, trainer: Any, module: BCOModule) -> None:
        self.reference.append(digest(module))


def digest(module: BCOModule) -> str:
    """Of the reference's weights: those of its own model, or the frozen ones of the policy; empty if there are none."""
    own = module.reference.own_model
    assert own is None or not any(value.requires_grad for value in own.parameters())
    frozen = [(name, value) for name, value in (own or module.policy).named_parameters() if not value.requires_grad]
    names = hashlib.sha256()
    for name, value in frozen:
        names.update(name.encode() + whole(value.detach()).numpy().tobytes())
    return names.hexdigest() if frozen else ""


def trajectory(model: str, log: str, **options: Any) -> dict[str, Any]:
    # The monitor and the shift follow the module's own callbacks; this one must see a step's shift before its update.
    recorder = Trajectory()
    result = tiny_fit(model, log, callbacks=[recorder], **options)
    return {
        **result, "sums": recorder.sums, "norms": recorder.norms, "reference": recorder.reference,
        "step_rows": recorder.rows,
    }  # fmt: skip


def losses(results: list[dict[str, Any]]) -> list[float]:
    """Mean weighted loss of each step over all processes."""
    return [
        sum(step[0] for step in steps) / sum(step[1] for step in steps)
        for steps in zip(*(result["sums"] for result in results), strict=True)
    ]


def cut(rows: int, accumulation: int, ranks: int, strategy: str = "ddp") -> dict[str, Any]:
    assert rows * accumulation * ranks == ROWS_PER_STEP
    trainer: dict[str, Any] = {"accumulate_grad_batches": accumulation, "devices": ranks}
    if ranks > 1:
        trainer["strategy"] = strategy
    return {"trainer_options": trainer, "data_options": {"batch_size": rows}, "module_options": {"learning_rate": 1e-3}}


def run(
    model: str, log: str, folder: Path, rows: int, accumulation: int, ranks: int, strategy: str = "ddp"
) -> list[dict[str, Any]]:
    one = partial(trajectory, model, log, **cut(rows, accumulation, ranks, strategy))
    return finish(start(one, ranks=ranks, folder=folder), folder)


@pytest.mark.promise("R4", "Micro-batches, processes and FSDP2 do not change the trajectory")
def test_the_cut_of_a_step_does_not_change_the_trajectory(
    byte_model: str, feedback: str, tmp_path: Path, trials: Trials
) -> None:
    first = run(byte_model, feedback, tmp_path, 8, 1, 1)
    expected = losses(first)
    cases = [(4, 2, 1, ""), (2, 4, 1, ""), (1, 8, 1, "")]
    cases += [(rows, 4 // rows, 2, strategy) for rows in (4, 2, 1) for strategy in ("ddp", "fsdp2")]
    for trial in trials(cases, quick=3):
        with trial as (rows, accumulation, ranks, strategy):
            folder = tmp_path / f"{rows}{ranks}{strategy}"
            results = run(byte_model, feedback, folder, rows, accumulation, ranks, strategy)
            found = losses(results)
            assert len(found) == STEPS
            residuals = [one / other - 1 for one, other in zip(found, expected, strict=True)]
            assert max(abs(residual) for residual in residuals) < 1e-5
            assert abs(sum(residuals) / STEPS) < 1e-6
            for name, value in first[0]["weights"].items():
                assert float((value - results[0]["weights"][name]).abs().max()) < 1e-5, name


def oracle(steps: list[dict[str, list[float]]], beta: float) -> dict[str, float]:
    """Metrics of rows in plain Python, from their log-probs and the shift of their step."""
    up, down = [], []
    for step in steps:
        for thumb, policy, reference, length in zip(
            step["thumbs_up"],
            step["policy_log_probs"],
            step["reference_log_probs"],
            step["completion_lengths"],
            strict=True,
        ):
            (up if thumb else down).append((beta * (policy - reference), step["reward_shift"][0], policy, length))

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values) if values else math.nan

    def loss(rows: list[tuple[float, ...]], sign: int) -> float:
        return mean([math.log1p(math.exp(-sign * (reward - shift))) for reward, shift, *_ in rows])

    right = [(r > shift) + (r == shift) / 2 for r, shift, *_ in up]  # a tie is half right
    right += [(r < shift) + (r == shift) / 2 for r, shift, *_ in down]
    return {
        "loss": loss(up, 1) + loss(down, -1),
        "reward_up": mean([row[0] for row in up]),
        "reward_down": mean([row[0] for row in down]),
        "margin": mean([row[0] for row in up]) - mean([row[0] for row in down]),
        "accuracy": mean([float(value) for value in right]),
        "log_prob_up": mean([row[2] for row in up]),
        "log_prob_down": mean([row[2] for row in down]),
        "length_up": mean([row[3] for row in up]),
        "length_down": mean([row[3] for row in down]),
    }


def measured(model: str, log: str, ranks: int, rows: int, interval: int) -> dict[str, Any]:
    options = cut(rows, ROWS_PER_STEP // rows // ranks, ranks)
    options["trainer_options"]["log_every_n_steps"] = interval
    return trajectory(model, log, **options)


@pytest.mark.promise("R13", "Logged metrics are those of the rows, over micro-batches and processes; NaN for no rows")
def test_logged_metrics_are_those_of_the_rows(byte_model: str, tmp_path: Path, trials: Trials) -> None:
    for trial in trials([(1, 8, 1), (1, 2, 4), (2, 4, 1), (2, 2, 4), (2, 1, 3)], quick=2):
        with trial as (ranks, rows, interval):
            log = make_log(tmp_path / "few_down.jsonl", num_rows=96, seed=5)
            lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
            for number, line in enumerate(lines):  # six thumbs-down: most steps have none
                line["label"] = number % 16 != 0
            Path(log).write_text("".join(json.dumps(line) + "\n" for line in lines))
            one = partial(measured, byte_model, log, ranks, rows, interval)
            results = finish(start(one, ranks=ranks, folder=tmp_path), tmp_path)
            missing = 0
            for result in results:
                for step, values in result["values"].items():
                    if not any(name.startswith("train/") for name in values):
                        continue
                    first = 0 if step == 1 else max(1, step - interval) if step - interval > 0 else 1
                    gathered = [r["step_rows"][n] for n in range(first, step) for r in results]
                    expected = oracle(gathered, beta=0.1)
                    missing += math.isnan(expected["reward_down"])
                    for name, value in expected.items():
                        assert values[f"train/{name}"] == pytest.approx(value, rel=1e-6, abs=1e-6, nan_ok=True), name
            assert missing or interval > 1


@pytest.mark.promise("R14", "The reference does not change, and every implicit reward is exactly 0 at step 0")
def test_the_reference_stays_as_it_was(byte_model: str, feedback: str, tmp_path: Path, trials: Trials) -> None:
    cases = [(*how, adapted) for how in ((1, ""), (2, "ddp"), (2, "fsdp2")) for adapted in (False, True)]
    for trial in trials(cases, quick=2):
        with trial as (ranks, strategy, adapted):
            options = cut(8 // ranks, 1, ranks, strategy)
            options["module_options"] = {
                "learning_rate": 1e-2, "lora": LoraSettings(r=4, alpha=8) if adapted else None,
                "reference_log_probs": "online",  # other micro-batches may round differently
            }  # fmt: skip
            one = partial(trajectory, byte_model, feedback, **options)
            for result in finish(start(one, ranks=ranks, folder=tmp_path), tmp_path):
                assert result["reference"][0] == result["reference"][1] != ""
                first, last = result["step_rows"][0], result["step_rows"][-1]
                assert first["policy_log_probs"] == first["reference_log_probs"]
                assert first["losses"] == pytest.approx([math.log(2)] * len(first["losses"]), abs=1e-7)
                assert last["policy_log_probs"] != last["reference_log_probs"]
                trained = sum(value.numel() for value in result["weights"].values())
                assert len(result["moments"]) == len(result["weights"])
                assert sum(moment["exp_avg"].numel() for moment in result["moments"]) == trained


@pytest.mark.promise("R15", "The same seed gives the same run, another seed other rows")
def test_the_same_seed_gives_the_same_run(byte_model: str, feedback: str, trials: Trials) -> None:
    orders = []
    for trial in trials(range(5), quick=2):
        with trial as seed:
            runs = [tiny_fit(byte_model, feedback, data_options={"seed": seed}) for _ in range(2)]
            assert_same(*runs)
            assert runs[0]["rows"] not in orders
            orders.append(runs[0]["rows"])


_OF_ITS_TIME_AND_PLACE = {"config.yaml", "metrics.jsonl", "report.html"}  # the folder's name, and speeds


@pytest.mark.promise("R15", "The same command twice gives the same checkpoint, byte for byte")
def test_the_same_command_gives_the_same_bytes(byte_model: str, feedback: str, tmp_path: Path) -> None:
    digests = []
    for number in range(2):
        folder = tmp_path / str(number)
        processes = start(
            partial(fit_by_command, byte_model, feedback), folder=folder, environment={"RUNS": str(folder)}
        )
        finish(processes, folder)
        run_folder = folder / "version_0"
        digests.append(
            {
                str(path.relative_to(run_folder)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in run_folder.rglob("*")
                if path.is_file() and "tfevents" not in path.name and path.name not in _OF_ITS_TIME_AND_PLACE
            }
        )
    assert digests[0] == digests[1]
    assert {"provenance.json", "checkpoints/step-00000024/values.json"} <= digests[0].keys()


def fit_by_command(model: str, log: str) -> None:
    from bco_lightning.cli.app import main

    options = {
        "model.name_or_path": model, "data.train_files": log, "trainer.max_epochs": "2", "trainer.accelerator": "cpu",
        "run_folder": os.environ["RUNS"], "data.validation_fraction": "0",
    }  # fmt: skip
    assert main(["fit", *(f"--{name}={value}" for name, value in options.items())]) == 0


@pytest.mark.promise("R16", "Losses and gradient norms of the golden trajectory, on one process and on two")
def test_the_golden_trajectory(byte_model: str, feedback: str, tmp_path: Path, trials: Trials) -> None:
    """A change of ``golden.json`` needs a reason in its commit: BCO_WRITE_GOLDEN=1 writes it anew."""
    for trial in trials([1, 2], quick=2):
        with trial as ranks:
            results = run(byte_model, feedback, tmp_path, ROWS_PER_STEP // ranks, 1, ranks)
            found = {"losses": losses(results), "gradient_norms": results[0]["norms"]}
            if os.environ.get("BCO_WRITE_GOLDEN") and ranks == 1:
                GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
            expected = json.loads(GOLDEN.read_text())
            for name, values in expected.items():
                assert found[name] == pytest.approx(values, rel=1e-5), name
                assert len(values) == STEPS


@pytest.mark.promise("R23", "Memory and open files do not grow with steps")
def test_memory_and_open_files_do_not_grow_with_steps(
    byte_model: str, feedback: str, tmp_path: Path, trials: Trials
) -> None:
    for trial in trials([trials.count(quick=350, full=2000)], quick=1):
        with trial as steps:
            (slope, files) = finish(start(grow, byte_model, feedback, steps, folder=tmp_path), tmp_path)[0]
            assert slope < 1024, f"{slope:.0f} bytes per step"
            assert len(set(files)) == 1


def grow(model: str, log: str, steps: int) -> tuple[float, list[int]]:
    resident, files, interval = [], [], 50

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step >= 200 and trainer.global_step % interval == 0:
                gc.collect()
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator holds for later is no leak
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
                files.append(len(list(Path("/proc/self/fd").iterdir())))

    # What the trials record grows by design.
    Recorder.on_train_batch_start = Callback.on_train_batch_start  # type: ignore[method-assign]
    Recorder.take = lambda *_: None  # type: ignore[assignment, method-assign]
    tiny_fit(model, log, callbacks=[Watch()], trainer_options={"max_epochs": -1, "max_steps": steps, "logger": False})
    x = torch.arange(len(resident), dtype=torch.float64)
    y = torch.tensor(resident, dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return float(slope) / interval, files


@pytest.mark.promise("R24", "An exported model gives the logits of the policy, from FSDP2 too")
def test_an_exported_model_gives_the_logits_of_the_policy(
    byte_model: str, feedback: str, tmp_path: Path, trials: Trials
) -> None:
    tokens = torch.arange(40).view(2, 20)
    cases = [(*how, adapted) for how in ((1, ""), (2, "ddp"), (2, "fsdp2")) for adapted in (False, True)]
    for trial in trials(cases, quick=2):
        with trial as (ranks, strategy, adapted):
            folder = tmp_path / f"{ranks}{strategy}{adapted}"
            one = partial(logits_after_training, byte_model, feedback, str(folder), ranks, strategy, adapted, tokens)
            expected = finish(start(one, ranks=ranks, folder=folder), folder)[0]
            export_checkpoint(folder, folder / "exported", merge=True)
            exported = AutoModelForCausalLM.from_pretrained(folder / "exported")
            with torch.no_grad():
                difference = exported(input_ids=tokens).logits - expected
            assert float(difference.abs().max()) <= (1e-6 if adapted else 0.0)
            assert not [path for path in (folder / "exported").iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def logits_after_training(
    model: str, log: str, folder: str, ranks: int, strategy: str, adapted: bool, tokens: torch.Tensor
) -> torch.Tensor:
    options = cut(8 // ranks, 1, ranks, strategy)
    options["module_options"] = {}
    options["trainer_options"]["default_root_dir"] = folder
    lora = LoraSettings(r=4, alpha=8) if adapted else None
    module = BCOModule(model, learning_rate=1e-2, dtype="float32", lora=lora)
    tiny_fit(model, log, module=module, callbacks=[RunCheckpoint()], **options)
    with torch.no_grad():
        return module.policy(input_ids=tokens).logits
