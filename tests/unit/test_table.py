"""What rows are known by, and which of them are held out or left out for it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bco_lightning import FeedbackDataModule
from bco_lightning.batch import FeedbackRow
from bco_lightning.data.options import Conflicts
from bco_lightning.data.table import CONFLICTING, RowTable, held_out_prompts, prompt_key, rows_in_conflict
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


def row(prompt: str = "a", completion: str = "b", *, more: dict[str, Any] | None = None, **others: Any) -> FeedbackRow:
    said = [{"role": "user", "content": prompt, **(more or {})}], [{"role": "assistant", "content": completion}]
    return FeedbackRow(*said, **{"thumbs_up": True, "place": "x:1", **others})


def test_the_prompt_key_is_that_of_what_is_said_and_of_the_tools() -> None:
    assert prompt_key(row()) == prompt_key(row(completion="c", num_trailing=1, more={"id": 7}))
    tools = [{"name": "f", "parameters": {}}], [{"parameters": {}, "name": "f"}], [{"name": "g"}]
    keys = [prompt_key(row(tools=known)) for known in (None, *tools)]
    assert keys[1] == keys[2]
    assert len({*keys, prompt_key(row("b"))}) == 4
    told = json.dumps([[["user", "a", None]], None]).encode()
    assert keys[0] == int.from_bytes(hashlib.sha256(told).digest()[:8], "big", signed=True)  # in every process


def test_the_digest_of_rows_is_of_all_that_they_say(tmp_path: Path) -> None:
    def digest(*rows: FeedbackRow) -> str:
        log = RowTable(tmp_path, ["x"])
        for known in rows:
            log.note(known, 0)
        return log.digest(np.ones(len(rows), bool))

    others = [
        [row("b")], [row(completion="c")], [row(thumbs_up=False)], [row(tools=[{"name": "f"}])],
        [row(template_options={"enable_thinking": False})], [row(more={"name": "n"})], [row(), row()], [],
    ]  # fmt: skip
    assert len({digest(row()), *(digest(*rows) for rows in others)}) == 9
    assert digest(row()) == digest(row(place="y:7"))


def test_the_split_does_not_depend_on_the_order_of_the_rows_but_on_the_seed() -> None:
    rows = [row(str(n % 30), place=str(n)) for n in range(60)]

    def held_out(rows: list[FeedbackRow], seed: int) -> set[str]:
        keys = np.array([prompt_key(known) for known in rows])
        return {known.place for known, out in zip(rows, held_out_prompts(keys, 0.2, seed), strict=True) if out}

    chosen = held_out(rows, seed=0)
    assert len(chosen) == 12
    assert held_out(rows[::-1], seed=0) == chosen
    assert held_out(rows, seed=1) != chosen


def test_some_of_both_thumbs_are_held_out_and_some_stay_wherever_there_are_enough_prompts() -> None:
    random, repaired = np.random.default_rng(0), 0
    for trial in range(200):
        keys = random.integers(0, 40, 60)
        up = random.random(60) < (0.1 if trial % 2 else 0.9)
        up[:4], up[4:8] = True, False
        keys[:8] = np.arange(100, 108)  # four prompts of each
        plain, found = held_out_prompts(keys, 0.1, trial), held_out_prompts(keys, 0.1, trial, [up, ~up])
        assert not set(keys[found]) & set(keys[~found])
        for rows in (up, ~up):
            assert found[rows].any()
            assert not found[rows].all()
        if all(plain[rows].any() and not plain[rows].all() for rows in (up, ~up)):
            assert (found == plain).all()
        else:
            repaired += 1
            assert len(set(keys[found]) ^ set(keys[plain])) <= 2
    assert 20 < repaired < 180


@pytest.mark.parametrize("downs", [0, 1])
def test_a_class_with_no_prompt_to_spare_stays_to_train_on(downs: int) -> None:
    keys, up = np.arange(30), np.arange(30) >= downs
    for seed in range(30):
        found = held_out_prompts(keys, 0.1, seed, [up, ~up])
        assert found.any()
        assert not found[~up].any()
