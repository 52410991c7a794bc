"""Distinct prompts, their thumbs and their folds are those of a plain loop over rows."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from bco_lightning.batch import FeedbackRow, TokenizedSample
from bco_lightning.data.row_table import RowTable
from bco_lightning.importance.prompt_table import PromptTable, prompt_key, prompt_length, prompt_lengths
from tests.conftest import tiny_data, tiny_module, tiny_trainer, write_jsonl

Rows = list[tuple[list[int], list[bool], bool]]


def table_of(rows: Rows) -> Dataset:
    """The data set that reading such rows gives."""
    with RowTable(["log"]) as table:
        for number, (ids, mask, up) in enumerate(rows):
            row = FeedbackRow([{"role": "user", "content": str(number)}], [], up, f"log:{number}")
            table.append(row, TokenizedSample(ids, mask))
        return table.divide({"train": np.ones(len(rows), dtype=bool)})["train"].dataset


def prompt_by_hand(ids: list[int], mask: list[bool]) -> tuple[int, ...]:
    for place in range(1, len(ids)):
        if mask[place]:
            return tuple(ids[:place])
    return tuple(ids[: max(1, len(ids) - 1)])


def key_by_hand(prompt: tuple[int, ...]) -> int:
    digest = hashlib.blake2b(b"".join(struct.pack("<i", token) for token in prompt), digest_size=8).digest()
    return struct.unpack("<Q", digest)[0]


def check(dataset: Dataset, rows: Rows, weights: np.ndarray[Any, Any] | None = None) -> None:
    """Compares a table with loops and dictionaries."""
    table = PromptTable.of(dataset, weights)
    prompts = [prompt_by_hand(ids, mask) for ids, mask, _ in rows]
    up, down = Counter(), Counter()
    for row, (prompt, (_, _, thumb)) in enumerate(zip(prompts, rows, strict=True)):
        (up if thumb else down)[prompt] += 1.0 if weights is None else float(weights[row])
    assert sorted(set(map(key_by_hand, prompts))) == table.keys.tolist()
    assert [int(table.keys[number]) for number in table.numbers] == [key_by_hand(prompt) for prompt in prompts]
    for number in range(len(table)):
        first = int(table.first_rows[number])
        prompt = prompts[first]
        assert prompt not in prompts[:first]
        assert int(table.keys[number]) == key_by_hand(prompt)
        assert table.num_up[number] == pytest.approx(up[prompt], abs=1e-12)
        assert table.num_down[number] == pytest.approx(down[prompt], abs=1e-12)
        assert int(table.folds[number]) == key_by_hand(prompt) % 5
    assert prompt_lengths(dataset).tolist() == list(map(len, prompts))


@st.composite
def some_rows(draw: st.DrawFn) -> Rows:
    prompts = draw(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4), min_size=1, max_size=4))
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        prompt = draw(st.sampled_from(prompts))
        completion = draw(st.lists(st.integers(0, 3), max_size=4))
        mask = draw(st.lists(st.booleans(), min_size=len(prompt + completion), max_size=len(prompt + completion)))
        rows.append((prompt + completion, mask, draw(st.booleans())))
    return rows


@settings(deadline=None, max_examples=60)
@given(rows=some_rows(), data=st.data())
def test_the_table_is_that_of_a_plain_loop(rows: Rows, data: st.DataObject) -> None:
    weights = data.draw(
        st.none() | st.lists(st.floats(0, 9), min_size=len(rows), max_size=len(rows)).map(lambda w: np.array(w))
    )
    check(table_of(rows), rows, weights)


def many_rows(number: int) -> Rows:
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(number):
        prompt = [1, int(generator.integers(40)), 2][: int(generator.integers(1, 4))]
        completion = generator.integers(3, 9, int(generator.integers(1, 5))).tolist()
        mask = [False] * len(prompt) + [True] * len(completion)
        rows.append((prompt + completion, mask, bool(generator.integers(2))))
    return rows


def test_rows_that_lie_in_several_batches_and_files_are_told_apart() -> None:
    rows = many_rows(2500)
    parts = [table_of(rows[:700]), table_of(rows[700:])]
    check(concatenate_datasets(parts), rows)


def test_a_selection_of_rows_in_another_order_has_its_own_table() -> None:
    rows, chosen = many_rows(1500), [1400, 3, 3, 700, 12]
    check(table_of(rows).select(chosen), [rows[row] for row in chosen])


def test_the_prompt_ends_where_the_first_assistant_turn_that_carries_loss_begins(tiny_model: str) -> None:
    talk = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "Four."},
    ]
    rows = [{"messages": talk, "label": True}, {"messages": talk[:1] + talk[3:], "label": False}]
    found = {}
    for loss_on in ("rated_turn", "all_turns"):
        data = tiny_data(write_jsonl(Path("log.jsonl"), rows), loss_on=loss_on, validation_fraction=0.0, num_workers=0)
        module = tiny_module(tiny_model)
        trainer = tiny_trainer(max_steps=1)
        data.trainer, module.trainer = trainer, trainer
        trainer.strategy.connect(module)
        data.prepare_data()
        data.setup("fit")
        found[loss_on] = PromptTable.of(data.train_dataset)
    assert len(found["rated_turn"]) == 2
    assert len(found["all_turns"]) == 1


def test_a_prompt_is_known_by_its_tokens_wherever_they_come_from() -> None:
    mask = [False, False, True]
    table = PromptTable.of(table_of([([70_000, 5, 9], mask, True)]))
    assert table.keys.tolist() == [prompt_key([70_000, 5])] == [prompt_key(np.array([70_000, 5]))]


def test_the_first_token_of_a_row_is_prompt_whatever_its_mask() -> None:
    assert [prompt_length(mask) for mask in ([True, True], [True], [True, False, False, True], [False] * 4)] == [
        1, 1, 3, 3,
    ]  # fmt: skip
