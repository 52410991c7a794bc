"""Two processes find the importance weights of one, with whole and with sharded models, in memory and of a stream."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from bco_lightning import BCOModule, LoraSettings
from bco_lightning.importance import weights as importance_weights
from bco_lightning.importance.features import ReferenceEncoder
from bco_lightning.parallel.strategy import named_strategy
from tests.distributed.runs import TORCHRUN
from tests.reliability.tiny_run import assert_same, finish, make_log, make_model, start, tiny_fit, wait

ROWS, ROWS_PER_STEP, STEPS = 150, 10, 4
KINDS = ("full", "lora")
TOGETHER = (("full", "fsdp2"), ("lora", "ddp"), ("full, streamed", "fsdp2"), ("lora, streamed", "ddp"))


def make_diverging_log(path: Path) -> str:
    """Praised for writing, blamed for code; some prompts have two rows."""
    random = np.random.default_rng(0)
    asked = ("Please write me a short poem on number {}.", "Please say why there is a bug in line {}.")
    praised = (0.9, 0.1)
    lines = []
    for row in range(ROWS):
        number = row - row % 50 // 48 * 2
        prompt = asked[number % 2].format(number)
        label = bool(random.random() < praised[number % 2])
        lines.append(json.dumps({"prompt": prompt, "completion": f"answer {row}", "label": label}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


class Weights(Callback):
    """Keeps the weight of each row that this process trains on."""

    def __init__(self) -> None:
        self.of_rows: dict[int, float] = {}
        self._given: list[torch.Tensor] = []

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        losses = module.objective.losses

        def recorded(rows: Any) -> torch.Tensor:
            self._given.append(torch.where(rows.thumbs_up_B, 1.0, rows.importance_weights_B))
            found: torch.Tensor = losses(rows)
            return found

        module.objective.losses = recorded

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.of_rows |= dict(zip(batch.row_ids_B.tolist(), self._given.pop().tolist(), strict=True))


def run(model: str, log: str, folder: Path, kind: str, strategy: str) -> dict[str, Any]:
    """Trains for some steps with weights that nothing on disk knows yet."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    module = BCOModule(
        model, importance_weights="auto", dtype="float32", cache_folder=str(folder / f"{strategy}, {kind}"),
        learning_rate=1e-2, lora=LoraSettings(r=4, alpha=8) if kind.startswith("lora") else None,
    )  # fmt: skip
    weights, batches = Weights(), 0

    def counted(*_: Any) -> None:
        nonlocal batches
        batches += 1

    with pytest.MonkeyPatch.context() as patch:
        features = ReferenceEncoder.features
        patch.setattr(ReferenceEncoder, "features", lambda *given: (counted(), features(*given))[1])
        tiny_fit(
            "", log, module=module, callbacks=[weights],
            trainer_options={"devices": processes, "strategy": named_strategy(strategy), "max_steps": STEPS,
                             "max_epochs": -1},
            data_options={"batch_size": ROWS_PER_STEP // processes, "streaming": kind.endswith("streamed")},
        )  # fmt: skip
    found = module.importance
    assert found is not None
    state = found.state_dict()
    state["told"]["report"] = {name: of for name, of in state["told"]["report"].items() if name != "seconds"}
    return {**state["ratio"], **state["rows"], "told": state["told"], "steps": weights.of_rows, "batches": batches}


Cases = tuple[tuple[str, str], ...]


def run_all(cases: Cases, model: str, log: str, folder: Path) -> dict[tuple[str, str], Any]:
    return {(kind, strategy): run(model, log, folder, kind, strategy) for kind, strategy in cases}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of one process by kind; of each of two by kind and strategy."""
    folder = tmp_path_factory.mktemp("importance")
    files = make_model(folder / "model"), make_diverging_log(folder / "log.jsonl")
    alone = partial(run_all, tuple((kind, "auto") for kind in KINDS), *files, folder)
    (one,) = finish(start(alone, folder=folder / "one"), folder / "one")
    together = partial(run_all, TOGETHER, *files, folder)
    two = finish(start(together, ranks=2, folder=folder / "two", environment=TORCHRUN), folder / "two", timeout=300)
    return {"one": {kind: found for (kind, _), found in one.items()}, "two": two}


@pytest.mark.parametrize(("kind", "strategy"), TOGETHER)
def test_two_processes_find_what_one_finds_and_the_same_bits(results: dict[str, Any], kind: str, strategy: str) -> None:
    one, (first, second) = results["one"][kind.split(",")[0]], (of_rank[kind, strategy] for of_rank in results["two"])
    assert one["told"]["report"]["has_evidence"]
    assert len(set(one["row_weights"].tolist())) > 50
    own = ("steps", "batches")
    assert_same(*({name: of[name] for name in of if name not in own} for of in (first, second)))
    if "streamed" not in kind:  # the rows of a sample are in an order of their own
        assert torch.allclose(first["row_weights"], one["row_weights"], rtol=1e-5, atol=0)
    assert first["told"]["ratio"]["normaliser"] == pytest.approx(one["told"]["ratio"]["normaliser"], rel=1e-5)
    assert first["told"]["report"]["evidence"] == pytest.approx(one["told"]["report"]["evidence"], rel=1e-4)
    assert first["told"]["report"]["num_prompts"] == one["told"]["report"]["num_prompts"] < ROWS
    assert one["batches"] == 3  # odd: in the end one process has none of its own, and makes a pass nevertheless
    assert [first["batches"], second["batches"]] == [2, 2]


@pytest.mark.parametrize(("kind", "strategy"), TOGETHER)
def test_processes_weigh_the_rows_of_their_steps_as_one_does(results: dict[str, Any], kind: str, strategy: str) -> None:
    known = results["one"][kind.split(",")[0]]["row_weights"]
    first, second = (of_rank[kind, strategy]["steps"] for of_rank in results["two"])
    assert len(first) == len(second) == STEPS * ROWS_PER_STEP // 2
    assert not first.keys() & second.keys()
    for row, weight in (first | second).items():
        assert weight == pytest.approx(float(known[row]), rel=1e-5 if "streamed" not in kind else 1e-4)


def refused(model: str, log: str, strategy: str, crashes: bool = False) -> None:
    module = BCOModule(model, importance_weights="on", dtype="float32")
    options = {"devices": 2, "strategy": named_strategy(strategy), "max_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        if crashes:
            patch.setattr(importance_weights, "fit_density_ratio", lambda *_, **__: 1 / 0)
        tiny_fit("", log, module=module, trainer_options=options, data_options={"batch_size": 4})


def last_words(folder: Path) -> list[str]:
    return [(folder / f"output.{rank}").read_text().strip().splitlines()[-1] for rank in (0, 1)]


def test_rows_that_are_too_few_end_both_processes_with_the_same_words(tmp_path: Path) -> None:
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl", num_rows=24)
    started = start(partial(refused, model, log, "fsdp2"), ranks=2, folder=tmp_path, environment=TORCHRUN)
    assert wait(started, timeout=60) == [1, 1]
    said = last_words(tmp_path)
    assert said[0] == said[1]
    assert "model.importance_weights: expected rows on which a classifier of prompts can be tested" in said[0]
    assert "found 16 up and 8 down" in said[0]


def test_a_crash_of_the_process_that_fits_ends_the_other_one_too(tmp_path: Path) -> None:
    model, log = make_model(tmp_path / "model"), make_diverging_log(tmp_path / "log.jsonl")
    started = start(partial(refused, model, log, "ddp", True), ranks=2, folder=tmp_path, environment=TORCHRUN)
    assert wait(started, timeout=60) == [1, 1]
    said = last_words(tmp_path)
    assert said[0] == said[1]
    assert "ZeroDivisionError: division by zero" in said[0]
