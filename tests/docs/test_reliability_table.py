"""The table of promises is what the trials noted, and every row of it passed and was seen red."""

from __future__ import annotations

import json

from tests.reliability_table import RECORD, TABLE, render
from tests.seeded_defects import DEFECTS, PACKAGE, ROOT

ROWS = {f"R{number}" for number in range(1, 26)} | {f"S{number}" for number in range(1, 20)}
ROWS -= {"S2"}  # was of checkpoints by URL, which are not fetched any more


def test_the_table_is_what_the_trials_noted() -> None:
    assert TABLE.read_text(encoding="utf-8") == render(json.loads(RECORD.read_text()))


def test_every_row_was_tried_passed_and_was_seen_red() -> None:
    record = json.loads(RECORD.read_text())
    assert record.keys() == ROWS
    for row, noted in record.items():
        assert all(test["passed"] == test["run"] > 0 for test in noted["tests"].values()), row
        assert noted["red"], row
        assert all(noted["red"].values()), row


def test_every_seeded_defect_still_has_its_place_in_the_source() -> None:
    assert {defect.row for defect in DEFECTS} == ROWS
    for defect in DEFECTS:
        text = (ROOT / PACKAGE / defect.file).read_text(encoding="utf-8")
        assert text.count(defect.old) == 1, f"{defect.row}: {defect.what}"
