"""Packing keeps every token of every row, in order, and a shared prompt once."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bco_lightning.data.collate import collate


def row(prompt: list[int], completion: list[int], row_id: int = 0, mask: list[bool] | None = None) -> dict[str, Any]:
    completion_mask = [False] * len(prompt) + (mask or [True] * len(completion))
    return {
        "input_ids": prompt + completion,
        "completion_mask": completion_mask,
        "thumbs_up": bool(row_id % 2),
        "row_id": row_id,
    }


token_lists = st.lists(st.integers(0, 3), min_size=1, max_size=6)  # few values, so that prompts are often the same


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(token_lists, token_lists), min_size=1, max_size=6))
def test_every_row_is_found_again_whatever_shares_its_prompt(rows: list[tuple[list[int], list[int]]]) -> None:
    batch = collate([row(prompt, completion, number) for number, (prompt, completion) in enumerate(rows)])
    assert batch.lengths == tuple(len(prompt) + len(completion) for prompt, completion in rows)
    assert batch.row_ids_B.tolist() == list(range(len(rows)))
    assert batch.completion_lengths.tolist() == [len(completion) for _, completion in rows]
    for number, (prompt, completion) in enumerate(rows):
        places = torch.tensor(batch.row_spans[number].places())
        assert batch.input_ids_S[places].tolist() == prompt + completion
        assert batch.position_ids_S[places].tolist() == list(range(len(places)))
        mine = batch.rows_N == number
        assert batch.targets_N[mine].tolist() == completion
        assert batch.predictors_N[mine].tolist() == places[len(prompt) - 1 : -1].tolist()


def test_a_prompt_that_rows_share_is_there_once() -> None:
    batch = collate([row([5, 6], [7], 0), row([8], [9], 1), row([5, 6], [4, 4], 2)])
    assert batch.num_computed == 2 + 1 + 2 + 2
    assert batch.num_tokens == 3 + 2 + 4
    assert batch.input_ids_S.tolist() == [5, 6, 7, 4, 4, 8, 9]


def test_spans_lie_side_by_side() -> None:
    batch = collate([row([5, 6], [7], 0), row([8], [9], 1), row([5, 6], [4, 4], 2)])
    assert [span.start for span in batch.spans] == [0, *(span.stop for span in batch.spans[:-1])]
    assert batch.spans[-1].stop == batch.num_computed


def test_tokens_inside_a_completion_that_carry_no_loss_are_not_scored() -> None:
    batch = collate([row([1], [2, 3, 4], mask=[True, False, True])])
    assert batch.targets_N.tolist() == [2, 4]
    assert batch.predictors_N.tolist() == [0, 2]


def test_the_first_token_of_a_row_without_a_prompt_is_not_scored() -> None:
    assert collate([row([], [2, 3])]).targets_N.tolist() == [3]


def test_a_row_with_nothing_to_score_stays_a_row() -> None:
    batch = collate([row([1, 2], [3], 0, mask=[False]), row([1, 2], [4], 1)])
    assert batch.completion_lengths.tolist() == [0, 1]
    assert batch.lengths == (3, 3)


def test_a_batch_moves_all_its_tensors() -> None:
    batch = collate([row([1, 2], [3])]).to("meta")
    assert batch.input_ids_S.is_meta
    assert batch.row_ids_B.is_meta
    assert batch.spans == collate([row([1, 2], [3])]).spans
