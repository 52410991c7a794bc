"""What fsdp2 refuses: a model that is whole already, and sampling from shards."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from bco_lightning import BCOModule
from bco_lightning.callbacks import KnownRewardTrial
from tests.reliability.tiny_run import make_log, make_model, start, tiny_fit, wait


def fit(model: str, log: str, case: str) -> None:
    module = BCOModule(model, dtype="float32", gradient_checkpointing=case == "gradient checkpointing")
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
        ("sampling", "expected whole weights to sample from, found fsdp2"),
        ("gradient checkpointing", ""),
    ],
)
def test_fsdp2_refuses_what_would_hang_or_train_alone(case: str, words: str, tmp_path: Path) -> None:
    model, log = make_model(tmp_path / "model"), make_log(tmp_path / "log.jsonl", num_rows=24)
    codes = wait(start(partial(fit, model, log, case), ranks=2, folder=tmp_path), timeout=60)
    assert codes == ([1, 1] if words else [0, 0]), (tmp_path / "output.0").read_text()[-2000:]
    assert words in (tmp_path / "output.0").read_text()
