"""The reward shift is the midpoint of the decayed class means."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bco_lightning import RewardShift
from bco_lightning.errors import ConfigError

rewards = st.lists(st.floats(-50, 50), max_size=5)


def feed(shift: RewardShift, up: list[float], down: list[float]) -> None:
    shift.update(sum_up=math.fsum(up), num_up=len(up), sum_down=math.fsum(down), num_down=len(down))


def test_it_is_zero_before_the_first_step() -> None:
    assert RewardShift().value == 0.0


def test_it_is_the_midpoint_of_class_means_at_nine_to_one() -> None:
    shift = RewardShift()
    feed(shift, [1.0] * 9, [-3.0])
    assert shift.value == -1.0  # the mean over rows would be 0.6


def test_it_has_no_bias_from_the_first_value_on() -> None:
    shift = RewardShift(decay=0.99)
    feed(shift, [2.0], [4.0])
    assert shift.value == pytest.approx(3.0)


def test_a_missing_class_keeps_its_mean() -> None:
    shift = RewardShift()
    feed(shift, [1.0], [-1.0])
    for _ in range(10_000):
        feed(shift, [1.0], [])
    assert shift.class_means == pytest.approx((1.0, -1.0))


def test_a_class_never_seen_counts_as_the_start_value() -> None:
    shift = RewardShift()
    feed(shift, [1.0], [])
    assert shift.value == 0.5


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(rewards, rewards), max_size=12), st.floats(0, 0.99))
def test_it_equals_a_direct_weighted_mean(steps: list[tuple[list[float], list[float]]], decay: float) -> None:
    shift = RewardShift(decay)
    for up, down in steps:
        feed(shift, up, down)
    means = []
    for which in (0, 1):
        seen = [step[which] for step in steps if step[which]]
        weights = [decay ** (len(seen) - 1 - age) for age in range(len(seen))]
        total = math.fsum(w * len(values) for w, values in zip(weights, seen, strict=True))
        summed = math.fsum(w * math.fsum(values) for w, values in zip(weights, seen, strict=True))
        means.append(summed / total if seen else 0.0)
    assert shift.value == pytest.approx(sum(means) / 2, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_sum_that_is_not_finite_is_refused_and_changes_nothing(bad: float) -> None:
    shift = RewardShift()
    feed(shift, [1.0], [0.0])
    before = shift.state_dict()
    with pytest.raises(ValueError, match="finite"):
        shift.update(sum_up=1.0, num_up=1, sum_down=bad, num_down=1)
    assert shift.state_dict() == before


def test_its_state_survives_a_round_trip_through_json() -> None:
    shift, restored = RewardShift(), RewardShift()
    feed(shift, [0.1, 0.7], [-0.3])
    restored.load_state_dict(json.loads(json.dumps(shift.state_dict())))
    feed(shift, [0.2], [0.4])
    feed(restored, [0.2], [0.4])
    assert restored.value == shift.value


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="reward_shift_decay"):
        RewardShift(decay)
