"""What fsdp2 refuses, and what it has all processes do equally often."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from bco_lightning import BCOModule, FeedbackDataModule
from bco_lightning.callbacks import PredictionWriter
from bco_lightning.demo.trial import KnownRewardTrial
from tests.reliability.tiny_run import make_log, make_model, start, tiny_fit, wait


def fit(model: str, log: str, case: str) -> None:
    module = BCOModule(model, dtype="float32")
    if case == "built":
        assert module.policy is not None
    tiny_fit(
        model, log, module=module, callbacks=[KnownRewardTrial("tone" if case == "sampling" else "none")],
        trainer_options={"devices": 2, "strategy": "fsdp2", "max_steps": 2}, data_options={"validation_files": log},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("built", "expected a module whose model is not built yet"),
        ("sampling", "expected whole weights to sample from, found them cut up"),
    ],
)
def test_fsdp2_refuses_what_would_hang_or_train_alone(case: str, words: str, tmp_path: Path) -> None:
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl", num_rows=24)
    codes = wait(start(partial(fit, model, log, case), ranks=2, folder=tmp_path), timeout=60)
    assert codes == [1, 1], (tmp_path / "output.0").read_text()[-2000:]
    assert words in (tmp_path / "output.0").read_text()


def score(model: str, log: str, scored: str) -> None:
    """Validates and predicts, from shards."""
    module = BCOModule(model, dtype="float32")
    data = FeedbackDataModule(log, validation_files=scored, predict_files=scored, batch_size=1, max_length=96)
    options: dict[str, Any] = {"devices": 2, "strategy": "fsdp2", "accelerator": "cpu"}
    quiet = {"enable_checkpointing": False, "logger": False, "enable_model_summary": False}
    trainer = Trainer(
        **options, **quiet, use_distributed_sampler=False, callbacks=[PredictionWriter(completions=1, max_new_tokens=4)]
    )
    if len(Path(scored).read_text().splitlines()) > 1:
        trainer.validate(module, data)
    trainer.predict(module, data)


def test_rows_that_do_not_come_out_even_are_evaluated_and_scored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl", num_rows=24)
    scored = make_log(tmp_path / "scored.jsonl", num_rows=9, seed=3)
    codes = wait(start(partial(score, model, log, scored), ranks=2, folder=tmp_path), timeout=90)
    assert codes == [0, 0], (tmp_path / "output.0").read_text()[-2000:]
    scores = [json.loads(line) for line in Path("predictions.jsonl").read_text().splitlines()]
    assert [score["row"] for score in scores if "completion" not in score] == [f"{scored}:{n}" for n in range(1, 10)]
    made = [score["prompt"] for score in scores if "completion" in score]
    assert made == sorted({score["prompt"] for score in scores})


def test_fewer_rows_to_score_than_processes_are_refused(tmp_path: Path) -> None:
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl", num_rows=24)
    scored = make_log(tmp_path / "scored.jsonl", num_rows=1, seed=3)
    codes = wait(start(partial(score, model, log, scored), ranks=2, folder=tmp_path), timeout=60)
    assert codes == [1, 1]
    found = (tmp_path / "output.0").read_text()
    assert "data.predict_files: expected a row for each of 2 processes, found 1" in found
