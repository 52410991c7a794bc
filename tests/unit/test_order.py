"""Row order is a function of seed and step alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bco_lightning.data.order import Pool, RowOrder, StepBatchSampler

NUM_ROWS, ROWS_PER_STEP = 23, 8


def order(seed: int = 0) -> RowOrder:
    return RowOrder([Pool(range(NUM_ROWS), [seed, 0])], [ROWS_PER_STEP])


def batches(batch_size: int, accumulation: int, world_size: int, start: int = 0) -> list:
    """Micro-batches of every rank, from ``start`` to the end of the epoch."""
    return [
        list(
            StepBatchSampler(
                order(),
                batch_size=batch_size,
                accumulation=accumulation,
                rank=rank,
                world_size=world_size,
                current_step=lambda: start,
            )
        )
        for rank in range(world_size)
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 5))
def test_every_pass_is_a_permutation_of_all_rows(num_rows: int, rows_per_step: int, seed: int) -> None:
    shuffled = RowOrder([Pool(range(num_rows), [seed])], [rows_per_step])
    stream = [row for step in range(3 * num_rows) for row in shuffled.rows_of_step(step)][: 3 * num_rows]
    for start in range(0, 3 * num_rows, num_rows):
        assert sorted(stream[start : start + num_rows]) == list(range(num_rows))


def test_passes_and_seeds_differ() -> None:
    stream = [row for step in range(NUM_ROWS) for row in order().rows_of_step(step)]
    assert stream[:NUM_ROWS] != stream[NUM_ROWS : 2 * NUM_ROWS]
    assert order(0).rows_of_step(0) != order(1).rows_of_step(0)
    assert order(5).rows_of_step(7) == order(5).rows_of_step(7)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "world_size"), [(8, 1, 1), (4, 2, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2)]
)
def test_steps_hold_the_same_rows_however_they_are_cut(batch_size: int, accumulation: int, world_size: int) -> None:
    cut = batches(batch_size, accumulation, world_size)
    for step in range(3):
        rows = [row for rank in cut for batch in rank[step * accumulation : (step + 1) * accumulation] for row in batch]
        assert sorted(rows) == sorted(order().rows_of_step(step))


def test_it_goes_on_where_the_restored_step_says() -> None:
    whole = [batch for rank in batches(4, 2, 1) for batch in rank]
    assert [batch for rank in batches(4, 2, 1, start=1) for batch in rank] == whole[2:]


def test_the_second_epoch_goes_on_in_the_stream() -> None:
    (second,) = batches(8, 1, 1, start=3)
    assert second == [order().rows_of_step(step) for step in (3, 4, 5)]


def test_class_pools_give_every_micro_batch_both_classes_in_equal_numbers() -> None:
    ups, downs = list(range(20)), list(range(20, 24))
    balanced = RowOrder([Pool(ups, [0, 0]), Pool(downs, [0, 1])], [4, 4])
    for step in range(10):
        rows = balanced.rows_of_step(step)
        for micro_batch in (rows[i : i + 2] for i in range(0, 8, 2)):
            assert len(set(micro_batch) & set(ups)) == 1


def test_the_rarer_class_is_oversampled_evenly() -> None:
    balanced = RowOrder([Pool(range(20), [0, 0]), Pool([20, 21, 22], [0, 1])], [3, 3])
    stream = [row for step in range(20) for row in balanced.rows_of_step(step)]
    assert {stream.count(row) for row in (20, 21, 22)} == {20}
    assert {stream.count(row) for row in range(20)} == {3}


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0]), min_size=2, max_size=4), st.integers(1, 12), st.integers(0, 5)
)
def test_weights_say_how_often_a_pass_takes_the_rows_of_a_source(
    weights: list[float], rows_of_each: int, passes: int
) -> None:
    sources = np.repeat(np.arange(len(weights)), rows_of_each)
    pool = Pool(range(len(sources)), [7], sources, weights)
    stream = [int(row) for number in range(passes) for row in pool.rows_of_pass(number)]
    assert len(stream) == passes * len(pool)
    for number, weight in enumerate(weights):
        taken = [stream.count(row) for row in np.flatnonzero(sources == number)]
        assert max(taken) - min(taken) <= 1  # evenly
        assert sum(taken) == passes * max(1, round(weight * rows_of_each))


def test_sources_are_mixed_within_a_pass() -> None:
    pool = Pool(range(200), [0], np.arange(200) // 100, [1.0, 0.5])
    first_half = pool.rows_of_pass(0)[:75]
    assert 30 < (first_half < 100).sum() < 70


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 5))
def test_rows_of_a_group_follow_each_other_in_every_pass(groups: list[int], seed: int) -> None:
    grouped = RowOrder([Pool(range(len(groups)), [seed], groups=np.array(groups))], [1])
    for start in (0, len(groups)):
        rows = [row for step in range(start, start + len(groups)) for row in grouped.rows_of_step(step)]
        assert sorted(rows) == list(range(len(groups)))
        runs = [group for group, _ in itertools.groupby(groups[row] for row in rows)]
        assert len(runs) == len(set(groups))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 5), st.permutations(range(6)))
def test_the_order_does_not_depend_on_which_numbers_groups_have(
    groups: list[int], seed: int, renamed: list[int]
) -> None:
    numbers = [np.array(groups), np.array([renamed[group] for group in groups])]
    orders = [RowOrder([Pool(range(len(groups)), [seed], groups=g)], [7]) for g in numbers]
    assert [orders[0].rows_of_step(step) for step in range(9)] == [orders[1].rows_of_step(step) for step in range(9)]


def test_groups_come_in_another_order_in_every_pass() -> None:
    grouped = RowOrder([Pool(range(20), [0], groups=np.arange(20) // 2)], [20])
    assert grouped.rows_of_step(0) != grouped.rows_of_step(1)


def test_sorting_by_length_keeps_the_rows_of_a_step_and_puts_like_lengths_together() -> None:
    lengths = np.random.default_rng(0).permutation(NUM_ROWS)
    options = {"batch_size": 2, "accumulation": 2, "current_step": lambda: 0}
    cut = [list(StepBatchSampler(order(), rank=r, world_size=2, lengths=lengths, **options)) for r in (0, 1)]
    for step in range(3):
        mine = [batch for rank in (0, 1) for batch in cut[rank][2 * step : 2 * step + 2]]
        assert sorted(row for batch in mine for row in batch) == sorted(order().rows_of_step(step))
        by_length = sorted(([int(lengths[row]) for row in batch] for batch in mine), key=min)
        assert [length for batch in by_length for length in batch] == sorted(lengths[order().rows_of_step(step)])
