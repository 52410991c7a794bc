"""The recipes train: their settings are run on the tiny model, for a few steps, on a CPU."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bco_lightning.checkpoints.folders import saved_steps
from bco_lightning.checkpoints.format import read_checkpoint
from bco_lightning.cli.app import main
from tests.conftest import write_jsonl
from tests.reliability.tiny_run import finish, start

CONFIGS = Path(__file__).parents[2] / "configs"


PAPER = {  # rows with the columns of the public sets
    "helpsteer2": {
        "prompt": "Question {n}?", "response": "Answer {n}.", "correctness": 3, "coherence": 4,
        "complexity": 1, "verbosity": 1,
    },
    "ultrafeedback": {
        "prompt": "Question {n}?", "prompt_id": "{n}", "messages": [{"role": "user", "content": "Question {n}?"}],
        "chosen": [{"role": "user", "content": "Question {n}?"}, {"role": "assistant", "content": "Good {n}."}],
        "rejected": [{"role": "user", "content": "Question {n}?"}, {"role": "assistant", "content": "Bad."}],
        "score_chosen": 8.0, "score_rejected": 4.0,
    },
    "capybara": {
        "source": "made", "original_response": "Bad.", "model": ["one"], "rating_chosen": 5, "rating_rejected": 4,
        "prompt": [
            {"role": "user", "content": "First {n}?"}, {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Question {n}?"},
        ],
        "chosen": [
            {"role": "user", "content": "First {n}?"}, {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Question {n}?"}, {"role": "assistant", "content": "Good {n}."},
        ],
        "rejected": [
            {"role": "user", "content": "First {n}?"}, {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Question {n}?"}, {"role": "assistant", "content": "Bad."},
        ],
    },
}  # fmt: skip


def train(name: str, model: str, log: str, **more: str) -> int:
    options = {
        "model.name_or_path": model,
        "model.learning_rate": "1e-3",
        "data.train_files": log,
        "trainer.accelerator": "cpu",
        "data.batch_size": "4",
        "trainer.max_steps": "3",
        "trainer.log_every_n_steps": "1",
        **more,
    }
    return main(["fit", f"--config={CONFIGS / f'{name}.yaml'}", *(f"--{k}={v}" for k, v in options.items())])


@pytest.mark.parametrize(
    "name",
    [
        "lora",
        "full",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("node_lora", "node_full", "nodes_full")),
    ],
)
def test_a_recipe_trains_from_zero_rewards(name: str, tiny_model: str, log: str, tmp_path: Path) -> None:
    if name.startswith("node"):
        two = {"trainer.devices": "2", "trainer.num_nodes": "1", "data.batch_size": "2"}
        processes = start(partial(train, name, tiny_model, log, **two), ranks=2, folder=tmp_path)
        assert finish(processes, tmp_path) == [0, 0]
    else:
        assert train(name, tiny_model, log) == 0
    run = Path("runs") / name / "version_0"
    events = EventAccumulator(str(run))
    events.Reload()
    margins = [event.value for event in events.Scalars("train/margin")]
    assert margins[0] == 0  # policy and reference round alike, under bfloat16 autocast too
    assert any(margins[1:])
    state = read_checkpoint(str(saved_steps(run / "checkpoints")[-1]))["state_dict"]
    assert all(value.dtype == torch.float32 for value in state.values())


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("ultrafeedback", "bco"),
        *(
            pytest.param(name, objective, marks=pytest.mark.slow)
            for name, objective in (
                ("ultrafeedback", "dpo"), ("capybara", "bco"), ("capybara", "nca"), ("helpsteer2", "bco"),
                ("helpsteer2", "una"),
            )
        ),
    ],
)  # fmt: skip
def test_the_runs_of_the_paper_start(name: str, objective: str, tiny_model: str, tmp_path: Path) -> None:
    rows = [json.loads(json.dumps(PAPER[name]).replace("{n}", str(n % 5))) for n in range(20)]
    for n, row in enumerate(rows):
        row |= {"helpfulness": n % 5} if name == "helpsteer2" else {}
    log = write_jsonl(tmp_path / "rows.jsonl", rows)
    one = {"trainer.strategy": "auto", "trainer.devices": "1", "trainer.precision": "32-true", "trainer.max_steps": "2"}
    more = {**one, "data.validation_files": log, "model.objective": objective}
    assert train(f"paper/{name}", tiny_model, log, **more) == 0
    assert (Path("runs") / f"paper_{name}" / "version_0" / "checkpoints").is_dir()
