"""Two processes under ddp and fsdp2 give the numbers of one, and go on with each other's checkpoints."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from bco_lightning.serving.export import export_checkpoint
from tests.distributed.runs import TORCHRUN, Case, go_on, run_all
from tests.reliability.tiny_run import finish, make_log, make_model, start

# In a quick run a few of these cases are in tests/reliability: cuts of a step, and moves between processes (R4, R5).
pytestmark = pytest.mark.slow

# What a strategy does in its own way stands in one of these: adapters, accumulation, a reference of its own, which
# is cut up too; activations that are computed again; weights that are cast as they are cut up.
TOGETHER = [
    Case("ddp", accumulation=2, online=True),
    Case("ddp", lora=True),
    Case("fsdp2"),
    Case("fsdp2", lora=True, accumulation=2),
    Case("fsdp2", online=True, stored="bfloat16"),
    Case("fsdp2", lora=True, online=True, other_reference=True),
    Case("fsdp2", accumulation=2, checkpointing=True),
    Case("fsdp2", lora=True, checkpointing=True, stored="bfloat16"),
    Case("fsdp2_cpu_offload", accumulation=2),
    # Processes have another number of micro-batches in a step each; that is compared with steps that are not cut.
    Case("ddp", tokens=70),
    Case("fsdp2", tokens=70),
]
# In bfloat16 the order of sums shows, so that numbers are near, not equal.
TOGETHER_COARSE = [
    Case("ddp", precision="bf16-mixed"),
    Case("fsdp2", precision="bf16-mixed"),
    Case("fsdp2", dtype="bfloat16", lora=True),
]
WRITERS = [Case(strategy, lora) for strategy in ("auto", "ddp", "fsdp2") for lora in (False, True)]
# One process reads under fsdp2 too: an elastic job may be left with one.
JOURNEYS = [
    (False, "auto", "fsdp2", 2),
    (False, "ddp", "fsdp2_cpu_offload", 2),
    (False, "fsdp2", "auto", 1),
    (False, "fsdp2", "ddp", 2),
    (True, "auto", "ddp", 2),
    (True, "ddp", "auto", 1),
    (True, "ddp", "fsdp2", 2),
    (True, "fsdp2", "fsdp2", 1),
]


def of_one_process(case: Case) -> Case:
    return replace(case, strategy="auto", tokens=None)


def journeys(processes: int) -> dict[tuple[str, str], Case]:
    return {
        (str(Case(source, lora)), f"{target} on {number}"): Case(target, lora)
        for lora, source, target, number in JOURNEYS
        if number == processes
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A model; 23 rows, of which steps take 8, three of them thumbs-up; 9 held-out rows. Nothing comes out even."""
    folder = tmp_path_factory.mktemp("strategies")
    log = Path(make_log(folder / "log.jsonl", num_rows=23))
    rows = log.read_text().replace("true", "false").splitlines()
    for number in (3, 11, 12):
        rows[number] = rows[number].replace("false", "true")
    log.write_text("\n".join(rows) + "\n")
    model = make_model(folder / "model-float32")
    make_model(folder / "model-other", seed=1)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(folder / "model-bfloat16")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder / "model-bfloat16")
    return str(folder / "model"), str(log), make_log(folder / "heldout.jsonl", num_rows=9, seed=3)


@pytest.fixture(scope="module")
def results(files: tuple[str, str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all runs ended with: those of one process first, then those of two, then journeys that end at one."""
    folder = tmp_path_factory.mktemp("runs")
    cases = {of_one_process(case) for case in (*TOGETHER, *TOGETHER_COARSE, *WRITERS)}
    (alone,) = finish(
        start(partial(run_all, [*cases], folder, *files), folder=folder / "alone"), folder / "alone", timeout=400
    )
    together = finish(
        start(partial(_together, folder, *files), ranks=2, folder=folder / "together", environment=TORCHRUN),
        folder / "together",
        timeout=400,
    )
    (home,) = finish(start(partial(go_on, journeys(1), folder, *files), folder=folder / "home"), folder / "home")
    return {"alone": alone, "together": together, "journeys": {**together[0][1], **home}, "folder": folder}


def _together(folder: Path, *files: str) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
    more = [case for case in WRITERS if case.strategy != "auto" and case not in TOGETHER]
    return run_all([*TOGETHER, *TOGETHER_COARSE, *more], folder, *files), go_on(journeys(2), folder, *files)


def close(found: Any, expected: Any, rounding: float) -> bool:
    return bool((found.double() - expected.double()).norm() <= rounding * max(1e-3, float(expected.double().norm())))


@pytest.mark.parametrize("case", TOGETHER, ids=str)
def test_two_processes_give_the_numbers_of_one(case: Case, results: dict[str, Any]) -> None:
    expected = results["alone"][str(of_one_process(case))]
    assert expected["step"] == 5
    assert expected["shifts"][-1] != 0
    for found in (rank[0][str(case)] for rank in results["together"]):
        assert found["class_weights"] == expected["class_weights"]
        assert found["shifts"] == pytest.approx(expected["shifts"], abs=1e-6)
        for step, gradient in enumerate(expected["gradients"]):
            assert found["gradients"][step].keys() == gradient.keys()
            assert all(close(found["gradients"][step][name], gradient[name], 1e-5) for name in gradient), step
        assert all(close(found["weights"][name], expected["weights"][name], 1e-5) for name in expected["weights"])
    values, of_two = expected["values"], results["together"][0][0][str(case)]["values"]
    assert any(name.startswith("val/") for step in values.values() for name in step)
    for step, logged in values.items():
        for name in (name for name in logged if not name.startswith("speed/")):
            assert of_two[step][name] == pytest.approx(logged[name], rel=1e-5, abs=1e-5, nan_ok=True), (step, name)


@pytest.mark.parametrize("case", TOGETHER_COARSE, ids=str)
def test_two_processes_give_nearly_the_numbers_of_one_in_bfloat16(case: Case, results: dict[str, Any]) -> None:
    expected, found = results["alone"][str(of_one_process(case))], results["together"][0][0][str(case)]
    first, other = expected["gradients"][0], found["gradients"][0]
    difference = sum((other[name].double() - first[name].double()).square().sum() for name in first)
    assert sum(value.double().square().sum() for value in first.values()) > 0
    assert difference <= 0.03**2 * sum(value.double().square().sum() for value in first.values())
    for step, logged in expected["values"].items():
        for name in ("train/loss", "val/loss"):
            if name in logged:
                assert found["values"][step][name] == pytest.approx(logged[name], abs=0.02, nan_ok=True), (step, name)


@pytest.mark.parametrize("case", TOGETHER, ids=str)
def test_every_row_of_a_step_is_trained_on_by_one_process(case: Case, results: dict[str, Any]) -> None:
    expected = results["alone"][str(of_one_process(case))]["rows"]
    parts = [rank[0][str(case)]["rows"] for rank in results["together"]]
    assert {step: sorted(parts[0][step] + parts[1][step]) for step in expected} == {
        step: sorted(rows) for step, rows in expected.items()
    }


@pytest.mark.parametrize("case", [case for case in TOGETHER if case.online], ids=str)
def test_a_reference_of_its_own_is_cut_up_like_the_policy(case: Case, results: dict[str, Any]) -> None:
    assert results["together"][0][0][str(case)]["own_reference"] == ("whole" if case.strategy == "ddp" else "cut up")


@pytest.mark.parametrize(("lora", "source", "target", "read_by"), JOURNEYS)
def test_a_run_goes_on_under_another_strategy_and_number_of_processes(
    lora: bool, source: str, target: str, read_by: int, results: dict[str, Any]
) -> None:
    expected = results["alone"][str(Case("auto", lora))]
    found = results["journeys"][str(Case(source, lora)), f"{target} on {read_by}"]
    assert found["step"] == 5
    assert min(found["rows"]) == 2  # it went on where the other had stopped
    assert found["shifts"] == pytest.approx(expected["shifts"][2:], abs=1e-6)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert close(found["weights"][name], weight, 1e-5), name
    for number, moments in expected["moments"].items():
        for name, moment in moments.items():
            assert close(found["moments"][number][name], moment, 1e-4), (number, name)


@pytest.mark.parametrize(("source", "lora"), [("ddp", False), ("fsdp2", False), ("fsdp2", True)])
def test_what_two_processes_wrote_is_exported_whole(
    lora: bool, source: str, results: dict[str, Any], tmp_path: Path
) -> None:
    case = str(Case(source, lora))
    export_checkpoint(results["folder"] / case, tmp_path / "exported")
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    trained = results["alone"][str(Case("auto", lora))]["weights"]
    with safe_open(tmp_path / "exported" / name, "pt") as exported:
        for key in exported.keys():  # noqa: SIM118
            ours = f"_policy.{key.replace('.weight', '.default.weight')}" if lora else f"_policy.{key}"
            assert close(exported.get_tensor(key), trained[ours], 1e-5), key
            assert not torch.equal(exported.get_tensor(key), torch.zeros_like(trained[ours]))


@pytest.mark.parametrize("lora", [False, True])
def test_each_process_writes_its_own_part_of_a_checkpoint(lora: bool, results: dict[str, Any]) -> None:
    case = str(Case("fsdp2", lora))
    folder = results["folder"] / case / "checkpoints" / "step-00000004"
    sizes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as part:
            keys = [key for key in part.keys() if key.startswith("state_dict/") or "/exp_avg" in key]  # noqa: SIM118
            sizes[path.name[:11]] = sum(part.get_tensor(key).numel() for key in keys)
    trained = sum(weight.numel() for weight in results["alone"][str(Case("auto", lora))]["weights"].values())
    assert sizes.keys() == {"shard-00001", "shard-00002"}
    assert sum(sizes.values()) == 3 * trained  # weights and both moments, each once
    assert min(sizes.values()) > 0.4 * max(sizes.values())
