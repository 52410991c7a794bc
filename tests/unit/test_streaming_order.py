"""The row order of a stream is a function of seed and step alone, even, and near in the files for each rank."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bco_lightning.data.sampling import StepBatchSampler
from bco_lightning.data.streaming.blocks import BLOCK
from bco_lightning.data.streaming.order import StreamOrder, shares_of
from bco_lightning.data.streaming.source_rows import SourceRows


def source(sizes: list[int], first_row: int = 0, weight: float = 1.0, **options: object) -> SourceRows:
    """A source with blocks of so many rows."""
    blocks = np.zeros(len(sizes), BLOCK)
    blocks["rows"], blocks["apart"] = sizes, 1
    blocks["first_row"] = first_row + np.cumsum(sizes) - sizes
    return SourceRows(blocks, options.pop("num_rows", np.array(sizes)), weight=weight, **options)


def stream(order: StreamOrder, epochs: int = 1) -> list[int]:
    return [row for step in range(epochs * order.steps_per_epoch) for row in order.rows_of_step(step)]


block_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(block_sizes, st.integers(1, 9), st.integers(0, 3), st.integers(1, 60))
def test_an_epoch_has_every_row_and_after_any_number_none_was_shown_two_times_more(
    sizes: list[int], rows_per_step: int, seed: int, shuffle_buffer: int
) -> None:
    order = StreamOrder([[source(sizes)]], [rows_per_step], seed, shuffle_buffer)
    assert order.steps_per_epoch == -(-sum(sizes) // rows_per_step)
    assert set(stream(order)) == set(range(sum(sizes)))
    for epochs in (1, 2, 5):
        times = Counter(stream(order, epochs))
        assert set(times) == set(range(sum(sizes)))
        assert max(times.values()) - min(times.values()) <= 1


@settings(max_examples=60, deadline=None)
@given(block_sizes, st.integers(1, 5), st.integers(1, 40))
def test_an_epoch_that_comes_out_even_is_a_permutation(sizes: list[int], factor: int, shuffle_buffer: int) -> None:
    rows_per_step = next(count for count in (5, 3, 2, 1) if sum(sizes) % count == 0)
    order = StreamOrder([[source(sizes)]], [rows_per_step], factor, shuffle_buffer)
    rows = stream(order, 3)
    for start in range(0, 3 * sum(sizes), sum(sizes)):
        assert sorted(rows[start : start + sum(sizes)]) == list(range(sum(sizes)))


@settings(max_examples=60, deadline=None)
@given(block_sizes, block_sizes, st.sampled_from([0.5, 1.0, 2.0, 3.0]), st.integers(1, 7))
def test_weights_are_passes_in_an_epoch_and_each_source_is_shown_evenly(
    one: list[int], other: list[int], weight: float, rows_per_step: int
) -> None:
    num_one = sum(one)
    pool = [source(one), source(other, first_row=num_one, weight=weight)]
    order = StreamOrder([pool], [rows_per_step], 0)
    assert order.steps_per_epoch == int(np.ceil((num_one + weight * sum(other)) / rows_per_step))
    times = Counter(stream(order, 4))
    assert sum(times.values()) == 4 * order.steps_per_epoch * rows_per_step
    for rows in (range(num_one), range(num_one, num_one + sum(other))):
        shown = [times[row] for row in rows]
        assert max(shown) - min(shown) <= 1
    expected = 4 * weight * sum(other)
    whole = sum(times.values()) / (4 * (num_one + weight * sum(other)))  # rows that fill up the last step
    assert abs(sum(times[row] for row in range(num_one, num_one + sum(other))) - whole * expected) <= 4


@settings(max_examples=200, deadline=None)
@given(st.lists(st.just(0.0) | st.floats(1e-3, 1e6), min_size=1, max_size=80).filter(any), st.integers(1, 300))
def test_shares_are_whole_add_up_and_give_each_source_a_row_while_there_are_enough(
    wanted: list[float], total: int
) -> None:
    shares, sources = shares_of(wanted, total), sum(size > 0 for size in wanted)
    assert sum(shares) == total
    assert all(
        (share >= (total >= sources)) if size else share == 0 for share, size in zip(shares, wanted, strict=True)
    )
    exact = [size * total / sum(wanted) for size in wanted]
    if all(part >= 1 for part in exact):
        assert all(abs(share - part) < 1 + 1e-6 for share, part in zip(shares, exact, strict=True))
    for one, other in zip(np.argsort(wanted, kind="stable"), np.argsort(wanted, kind="stable")[1:], strict=False):
        assert shares[one] <= shares[other] or wanted[one] == wanted[other]


@pytest.mark.parametrize("rows_per_step", [8, 64])
def test_sources_that_outnumber_the_weighted_rows_leave_none_with_less_than_nothing(rows_per_step: int) -> None:
    order = StreamOrder([[source([4], first_row=4 * n, weight=0.01) for n in range(60)]], [rows_per_step], 0)
    assert order.steps_per_epoch == 1
    times = Counter(row // 4 for row in stream(order))
    assert sum(times.values()) == rows_per_step
    assert len(times) == min(60, rows_per_step)


def by_class(sizes: list[int], up: np.ndarray) -> list[list[SourceRows]]:
    """Pools of one source in which ``up`` says which rows are thumbs-up."""
    flags = np.where(up, 1, 2).astype(np.uint8)
    borders = np.cumsum(sizes)[:-1]
    return [
        [
            source(
                sizes,
                chosen=flags,
                flag=flag,
                num_rows=[int((part == flag).sum()) for part in np.split(flags, borders)],
            )
        ]
        for flag in (1, 2)
    ]


def test_class_pools_give_every_micro_batch_both_classes_and_repeat_the_rarer_evenly() -> None:
    sizes, up = [16] * 20, np.arange(320) % 10 == 3
    order = StreamOrder(by_class(sizes, up), [4, 4], 0, 50)
    assert order.steps_per_epoch == 288 // 4
    for step in range(order.steps_per_epoch):
        rows = order.rows_of_step(step)
        assert [bool(up[row]) for row in rows] == [True, False] * 4
    times = Counter(stream(order))
    assert {times[row] for row in np.flatnonzero(~up).tolist()} == {1}
    assert {times[row] for row in np.flatnonzero(up).tolist()} == {9}


@settings(max_examples=60, deadline=None)
@given(block_sizes, st.integers(0, 2**30), st.integers(1, 4))
def test_rows_of_a_class_are_found_by_rank(sizes: list[int], bits: int, weight: int) -> None:
    up = np.array([bool(bits >> (row % 30) & 1) for row in range(sum(sizes))])
    for rows, wanted in zip(by_class(sizes, up), (up, ~up), strict=True):
        expected = np.flatnonzero(wanted).tolist()
        assert len(rows[0]) == len(expected)
        assert rows[0].rows_at(np.arange(len(expected))) == expected
        cells = rows[0].cells()
        assert cells.num_rows.sum() == len(expected)
        assert (cells.num_rows > 0).all()
        assert cells.first.tolist() == (np.cumsum(cells.num_rows) - cells.num_rows).tolist()


def test_a_rare_class_takes_no_more_cells_than_its_rows_need() -> None:
    up = np.arange(10_000) % 100 == 7
    rare, common = by_class([100] * 100, up)
    assert len(common[0].cells().first) == 100
    assert len(rare[0].cells().first) <= 2


def test_blocks_that_cannot_be_read_apart_stay_together() -> None:
    blocks = np.zeros(6, BLOCK)
    blocks["rows"], blocks["first_row"], blocks["apart"] = 10, np.arange(6) * 10, [1, 0, 0, 1, 0, 1]
    assert SourceRows(blocks, blocks["rows"]).cells().first.tolist() == [0, 30, 50]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "world_size"), [(8, 1, 1), (4, 2, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2)]
)
def test_steps_hold_the_same_rows_however_they_are_cut(batch_size: int, accumulation: int, world_size: int) -> None:
    order = StreamOrder([[source([7] * 9)]], [8], 0, 20)
    for rank in range(world_size):
        batches = list(
            StepBatchSampler(
                order,
                batch_size=batch_size,
                accumulation=accumulation,
                rank=rank,
                world_size=world_size,
                current_step=lambda: 3,
            )
        )
        for number, batch in enumerate(batches):
            step, micro_batch = divmod(number, accumulation)
            start = (micro_batch * world_size + rank) * batch_size
            assert batch == order.rows_of_step(3 + step)[start : start + batch_size]


def test_any_step_can_be_asked_for_first() -> None:
    make = lambda: StreamOrder([[source([5] * 30, weight=1.5), source([3] * 9, 150)]], [7], 3, 40)  # noqa: E731
    whole = [make().rows_of_step(step) for step in range(60)]
    again = make()
    assert [again.rows_of_step(step) for step in reversed(range(60))] == whole[::-1]


def test_epochs_and_seeds_differ() -> None:
    one, other = (StreamOrder([[source([8] * 20)]], [8], seed) for seed in (0, 1))
    assert stream(one) != stream(other)
    assert stream(one) != stream(one, 2)[160:]


def test_each_rank_reads_few_blocks_at_a_time_and_a_step_mixes_far_places() -> None:
    order = StreamOrder([[source([64] * 400)]], [8], 0, shuffle_buffer=8 * 64)
    rows = np.array([order.rows_of_step(step) for step in range(order.steps_per_epoch)])
    blocks = rows // 64
    for lane in range(8):
        for start in range(0, 3200 - 64, 64):
            # A window of as many rows as a block touches two or three blocks at most, and a stretch of it two windows.
            assert len(np.unique(blocks[start : start + 64, lane])) <= 5
        _, reads = np.unique(blocks[:, lane], return_counts=True)
        assert reads.mean() > 60  # whole blocks, but for the ends of lanes
    assert np.mean([len(set(step)) for step in blocks.tolist()]) > 7.9
    steps = np.diff(np.sort(rows, axis=1), axis=1)
    assert np.median(steps) > 400


def test_no_step_needs_new_blocks_for_all_lanes() -> None:
    order = StreamOrder([[source([64] * 400)]], [8], 0, shuffle_buffer=8 * 64)
    seen: list[set[int]] = [set() for _ in range(8)]
    new = []
    for step in range(order.steps_per_epoch):
        blocks = [row // 64 for row in order.rows_of_step(step)]
        new.append(sum(block not in known for block, known in zip(blocks, seen, strict=True)))
        for block, known in zip(blocks, seen, strict=True):
            known.add(block)
    assert new[0] == 8
    assert max(new[1:]) <= 4


def test_rows_within_a_window_come_in_random_order() -> None:
    order = StreamOrder([[source([1000])]], [1], 0, shuffle_buffer=100)
    lane = np.array(stream(order))
    for start in range(0, 1000, 100):
        assert sorted(lane[start : start + 100].tolist()) == list(range(start, start + 100))
    assert np.abs(np.corrcoef(lane[:100], np.arange(100))[0, 1]) < 0.4


def test_ten_million_rows_take_memory_by_block() -> None:
    import tracemalloc

    rows = source([256] * 40_000)
    tracemalloc.start()
    order = StreamOrder([[rows]], [64], 0)
    for step in range(3):
        assert len(set(order.rows_of_step(step))) == 64
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6  # one number for each row would take 80


def test_a_few_rows_are_repeated_without_a_list_of_the_repetitions() -> None:
    up = np.zeros(100_000, bool)
    up[[7, 50_000, 99_999]] = True
    order = StreamOrder(by_class([100] * 1000, up), [1, 1], 0)
    times = Counter(row for step in range(3000) for row in order.rows_of_step(step) if up[row])
    assert set(times) == {7, 50_000, 99_999}
    whole = Counter(order.rows_of_step(step)[0] for step in range(order.steps_per_epoch))
    assert max(whole.values()) - min(whole.values()) <= 1
