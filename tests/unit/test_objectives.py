"""The objective has the properties that the paper proves; float64 on random inputs, closed forms as oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bco_lightning import bce_loss, bco_loss

reward = st.floats(-30, 30, allow_nan=False)
many = settings(max_examples=200, deadline=None)


def pair_loss(r_w: float, r_l: float, shift: float) -> float:
    rewards = torch.tensor([r_w, r_l], dtype=torch.float64)
    return float(bco_loss(rewards, torch.tensor([True, False]), reward_shift=shift).sum())


def dpo(r_w: float, r_l: float) -> float:
    return math.log1p(math.exp(-(r_w - r_l)))


@many
@given(reward, reward, reward)
def test_binary_cross_entropy_bounds_dpo_for_every_shift(r_w: float, r_l: float, shift: float) -> None:
    """Theorems 1 and 3."""
    assert pair_loss(r_w, r_l, shift) >= dpo(r_w, r_l) * (1 - 1e-12)


@many
@given(reward, reward, reward)
def test_gap_to_dpo_is_the_closed_form(r_w: float, r_l: float, shift: float) -> None:
    error_term = math.exp(-(r_w - shift)) + math.exp(r_l - shift)
    gap = math.log1p(error_term / (1 + math.exp(-(r_w - r_l))))
    assert pair_loss(r_w, r_l, shift) - dpo(r_w, r_l) == pytest.approx(gap, rel=1e-9, abs=1e-9)


@many
@given(reward, reward, st.floats(0.01, 5))
def test_error_term_is_smallest_at_the_midpoint(r_w: float, r_l: float, distance: float) -> None:
    """Theorem 4."""
    midpoint = (r_w + r_l) / 2

    def error_term(shift: float) -> float:
        return math.exp(-(r_w - shift)) + math.exp(r_l - shift)

    assert error_term(midpoint) < min(error_term(midpoint - distance), error_term(midpoint + distance))
    assert pair_loss(r_w, r_l, midpoint) <= pair_loss(r_w, r_l, midpoint + distance) * (1 + 1e-12)  # rounding


@many
@given(reward, reward)
def test_with_the_optimal_shift_it_is_twice_dpo_at_half_beta(r_w: float, r_l: float) -> None:
    midpoint = (r_w + r_l) / 2
    assert pair_loss(r_w, r_l, midpoint) == pytest.approx(2 * dpo(r_w / 2, r_l / 2), rel=1e-9, abs=1e-12)


def test_each_row_costs_log_two_at_the_start() -> None:
    losses = bco_loss(torch.zeros(3, dtype=torch.float64), torch.tensor([True, False, True]), reward_shift=0.0)
    assert losses.tolist() == pytest.approx([math.log(2)] * 3)


@many
@given(reward, reward, st.booleans())
def test_gradient_weight_is_the_probability_of_the_wrong_class(r: float, shift: float, up: bool) -> None:
    rewards = torch.tensor([r], dtype=torch.float64, requires_grad=True)
    bco_loss(rewards, torch.tensor([up]), reward_shift=shift).sum().backward()
    sign = 1 if up else -1
    wrong = 1 / (1 + math.exp(sign * (r - shift)))
    assert rewards.grad is not None
    assert rewards.grad.item() == pytest.approx(-sign * wrong, rel=1e-9)


def test_importance_weights_multiply_each_row() -> None:
    rewards, up = torch.tensor([0.3, -0.2]), torch.tensor([True, False])
    weights = torch.tensor([1.0, 2.5])
    plain = bco_loss(rewards, up, reward_shift=0.1)
    assert torch.equal(bco_loss(rewards, up, reward_shift=0.1, importance_weights=weights), plain * weights)


def test_bce_is_bco_without_a_shift() -> None:
    rewards, up = torch.tensor([0.3, -0.2]), torch.tensor([True, False])
    assert torch.equal(bce_loss(rewards, up, reward_shift=7.0), bco_loss(rewards, up, reward_shift=0.0))


def test_extreme_rewards_stay_finite() -> None:
    losses = bco_loss(torch.tensor([-1e4, 1e4]), torch.tensor([True, False]), reward_shift=0.0)
    assert losses.tolist() == [1e4, 1e4]


@pytest.mark.parametrize(
    ("up", "shift", "message"),
    [
        (
            torch.tensor([True, False]),
            torch.tensor(0.1, requires_grad=True),
            "reward_shift must not require a gradient",
        ),
        (torch.tensor([[True], [False]]), 0.0, r"bool of shape \(2,\)"),
        (torch.tensor([1, 0]), 0.0, "must be bool"),
    ],
)
def test_misuse_is_refused(up: torch.Tensor, shift: torch.Tensor | float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bco_loss(torch.zeros(2), up, reward_shift=shift)
