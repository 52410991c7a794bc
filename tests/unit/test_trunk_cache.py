"""Kept trunk states are those of the trunk, and spare its layers from the second epoch on."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bco_lightning import BCOModule, LoraSettings
from bco_lightning.batch import FeedbackBatch
from bco_lightning.data.collate import collate
from bco_lightning.errors import ConfigError
from bco_lightning.trunk_cache import TrunkCache
from tests.conftest import tiny_data, tiny_module, tiny_trainer

ROWS = [([5, 6], [7]), ([8], [9, 9]), ([5, 6], [4, 4]), ([3], [2])]


def batch_of(*row_ids: int) -> FeedbackBatch:
    return collate(
        [
            {
                "input_ids": ROWS[row][0] + ROWS[row][1],
                "completion_mask": [False] * len(ROWS[row][0]) + [True] * len(ROWS[row][1]),
                "thumbs_up": True,
                "row_id": row,
            }
            for row in row_ids
        ]
    )


def states_of(batch: FeedbackBatch) -> torch.Tensor:
    """A state that tells token and position."""
    return torch.stack([batch.input_ids_S, batch.position_ids_S], dim=1).to(torch.bfloat16)


def cache() -> TrunkCache:
    return TrunkCache(np.array([len(prompt) + len(completion) for prompt, completion in ROWS]), 2, torch.bfloat16)


@pytest.mark.parametrize("recorded", [[(0, 2), (1, 3)], [(0,), (1,), (2,), (3,)]])
@pytest.mark.parametrize("asked", [(0, 2), (2, 1), (3, 2, 1, 0), (1,)])
def test_states_come_back_however_rows_are_packed_together(recorded: list, asked: tuple[int, ...]) -> None:
    kept = cache()
    for rows in recorded:
        kept.record(batch_of(*rows), states_of(batch_of(*rows)))
    found = kept.lookup(batch_of(*asked))
    assert found is not None
    assert torch.equal(found, states_of(batch_of(*asked)))


def test_a_micro_batch_with_an_unknown_row_is_not_known() -> None:
    kept = cache()
    kept.record(batch_of(0, 2), states_of(batch_of(0, 2)))
    assert kept.lookup(batch_of(0, 1)) is None
    assert kept.lookup(batch_of(0)) is not None


def test_its_size_is_known_beforehand_and_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = cache()
    size = (3 + 3 + 4 + 2) * 2 * 2
    assert TrunkCache.num_bytes_of(np.array([3, 3, 4, 2]), 2, torch.bfloat16) == size
    kept.record(batch_of(0), states_of(batch_of(0)))
    del kept
    assert not list(tmp_path.iterdir())


def test_its_room_on_the_disk_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda _file, start, size: taken.append(start + size))
    kept = cache()
    assert taken == [kept._states_TH.numel() * 2]


def test_a_disk_without_room_is_said_before_the_first_step(
    tiny_model: str, log: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    module = tiny_module(tiny_model, lora=LoraSettings(r=4, alpha=8, top_layers=1), cache_trunk=True)
    with pytest.raises(ConfigError, match=r"(?s)model.cache_trunk: expected .* MiB in .*No space left.*TMPDIR"):
        tiny_trainer(max_epochs=1).fit(module, tiny_data(log))


def fitted(tiny_model: str, log: str, **options: Any) -> tuple[BCOModule, list[int]]:
    """A module after two epochs, and which of its two layers ran when."""
    module = tiny_module(tiny_model, lora=LoraSettings(r=4, alpha=8, top_layers=1), **options)
    ran: list[int] = []
    for number, layer in enumerate(module.policy.get_base_model().model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    trainer = tiny_trainer(max_epochs=2)
    trainer.fit(module, tiny_data(log, validation_fraction=0.0))
    return module, ran


def test_a_run_with_kept_states_ends_like_one_without_and_runs_the_trunk_once_per_row(
    tiny_model: str, log: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, ran_plain = fitted(tiny_model, log, reference_log_probs="online")
    kept, ran_kept = fitted(tiny_model, log, reference_log_probs="online", cache_trunk=True)
    for ours, theirs in zip(kept.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert ran_plain.count(0) == 12  # two epochs of six steps, once for policy and reference
    assert ran_kept.count(0) == 6
    assert ran_kept.count(1) == ran_plain.count(1) == 24


def test_without_a_trunk_it_is_refused(tiny_model: str, log: str) -> None:
    module = tiny_module(tiny_model, cache_trunk=True)
    with pytest.raises(ConfigError, match=r"(?s)model.cache_trunk: expected a packed model.*model.lora.top_layers"):
        tiny_trainer(max_epochs=1).fit(module, tiny_data(log))
