"""Two processes train as one does, with objectives that keep more than a reward shift or take pairs."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bco_lightning import BCOModule
from bco_lightning.parallel.strategy import named_strategy
from tests.conftest import write_jsonl
from tests.distributed.runs import TORCHRUN
from tests.reliability.tiny_run import finish, make_model, start, tiny_fit

CASES = (("kto", "ddp"), ("kto", "fsdp2"), ("dpo", "ddp"), ("dpo", "fsdp2"), ("kldo", "ddp"))


def run_all(model: str, log: str, folder: Path) -> dict[tuple[str, str], Any]:
    processes, found = int(os.environ.get("WORLD_SIZE", "1")), {}
    for objective, strategy in CASES:
        module = BCOModule(
            model, objective=objective, dtype="float32", learning_rate=1e-2, cache_folder=str(folder / objective)
        )
        tiny_fit(
            "", log, module=module,
            trainer_options={"devices": processes, "strategy": named_strategy(strategy) if processes > 1 else "auto",
                             "max_steps": 3, "max_epochs": -1},
            data_options={"batch_size": 8 // processes},
        )  # fmt: skip
        values = [baseline.value for baseline in module.objective.baselines.values()]
        found[objective, strategy] = [module.reward_shift.value, *values]
    return found


@pytest.mark.slow
def test_two_processes_keep_what_one_keeps(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "chosen": f"yes {n}", "rejected": "no " * (n % 3 + 1)} for n in range(16)]
    log = write_jsonl(tmp_path / "pairs.jsonl", rows)
    run = partial(run_all, make_model(tmp_path / "model"), log, tmp_path)
    (one,) = finish(start(run, folder=tmp_path / "one"), tmp_path / "one")
    two = finish(start(run, ranks=2, folder=tmp_path / "two", environment=TORCHRUN), tmp_path / "two", timeout=300)
    for found in two:
        for case in CASES:
            assert found[case] == pytest.approx(one[case], rel=1e-3, abs=1e-6), case
            assert any(found[case])
