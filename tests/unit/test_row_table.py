"""Rows of a table can be had by another process too, from the same file."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import numpy as np
import pytest

from bco_lightning.batch import FeedbackRow, TokenizedSample
from bco_lightning.data.row_table import RowSet, RowTable
from bco_lightning.errors import FaultError


def row_set() -> RowSet:
    with RowTable(sources=["x"]) as table:
        for number in range(3):
            row = FeedbackRow([{"role": "user", "content": f"q{number}"}], [], bool(number), f"x:{number}")
            table.append(row, TokenizedSample([number, 7], [False, True]))
        return table.divide({"train": np.ones(3, dtype=bool)})["train"]


def test_rows_are_shared_by_plain_values_and_outlive_their_maker() -> None:
    made = row_set()
    told = json.loads(json.dumps(made.told()))
    rows, counts, digest = list(made.dataset), made.counts, made.digest
    shared = RowSet.shared(told)
    del made
    gc.collect()  # closes the maker's file
    assert list(shared.dataset) == rows
    assert (shared.counts, shared.digest) == (counts, digest)
    # Loader workers that do not fork open the file anew.
    assert Path(shared.dataset.cache_files[0]["filename"]).stat().st_ino == told["inode"]


@pytest.mark.parametrize("change", [{"path": "/proc/1/fd/99999"}, {"inode": 1}], ids=["no file", "another file"])
def test_a_process_that_cannot_see_the_file_says_so(change: dict) -> None:
    made = row_set()
    with pytest.raises(FaultError, match=r"processes: expected those of a node to see each other's open files"):
        RowSet.shared({**made.told(), **change})
