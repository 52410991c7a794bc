"""Answers with thumbs of both kinds are kept, or lose rows by a rule."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bco_lightning import FeedbackDataModule
from bco_lightning.data.conflicts import CONFLICTING, Conflicts, rows_in_conflict
from bco_lightning.errors import FeedbackRowError
from tests.conftest import write_jsonl

RULES: tuple[Conflicts, ...] = ("keep", "drop", "majority", "last")


def kept_by_hand(rows: list[tuple[int, bool]], rule: Conflicts) -> list[bool]:
    """Which rows stay, answer by answer."""
    kept = []
    for answer, up in rows:
        thumbs = [thumb for other, thumb in rows if other == answer]
        count = Counter(thumbs)
        kept.append(
            rule == "keep"
            or len(count) == 1
            or (rule == "majority" and count[up] > count[not up])
            or (rule == "last" and thumbs[-1] == up)
        )
    return kept


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=25), st.sampled_from(RULES))
def test_a_rule_leaves_out_what_it_says(rows: list[tuple[int, bool]], rule: Conflicts) -> None:
    keys = np.array([answer for answer, _ in rows], dtype=np.uint64)
    thumbs_up = np.array([up for _, up in rows], dtype=bool)
    assert (~rows_in_conflict(keys, thumbs_up, rule)).tolist() == kept_by_hand(rows, rule)


@pytest.mark.parametrize(
    ("rule", "used", "left_out"), [("keep", 10, 0), ("drop", 7, 3), ("majority", 9, 1), ("last", 8, 2)]
)
def test_conflicting_thumbs_of_a_log_are_left_out_and_counted(
    tokenizer: Any, tmp_path: Path, rule: Conflicts, used: int, left_out: int
) -> None:
    rows = [{"prompt": f"q{n}", "completion": "a", "label": n % 2 == 0} for n in range(6)]
    rows += [{"prompt": "disputed", "completion": "a", "label": label} for label in (True, True, False)]
    rows += [{"prompt": "disputed", "completion": "another answer", "label": False}]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    module = FeedbackDataModule(log, tokenizer=tokenizer, validation_fraction=0.0, conflicts=rule)
    module.setup("fit")
    [counts] = module.counts
    assert (counts.read, counts.used) == (10, used)
    assert {reason: counted.count for reason, counted in counts.left_out.items()} == (
        {CONFLICTING: left_out} if left_out else {}
    )
    assert len(module.train_dataset) == used


def test_a_log_that_disputes_every_answer_is_refused_with_the_reason(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False)]
    log = write_jsonl(tmp_path / "log.jsonl", rows)
    module = FeedbackDataModule(log, tokenizer=tokenizer, validation_fraction=0.0, conflicts="drop")
    with pytest.raises(FeedbackRowError, match=r"found none \(2 left out, 0 malformed\)\. conflicting thumbs"):
        module.setup("fit")
