"""The alignment report computes what it names."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial

import pytest
import torch

from bco_lightning.demo.trial import Alignment, Samples, measure_alignment


def measured(policy: list[list[float]], reference: list[list[float]]) -> Alignment:
    rewards_PS = torch.tensor(policy)
    value = partial(torch.full_like, rewards_PS)
    return measure_alignment(
        Samples(rewards_PS, value(-10.0), value(-12.0), value(4)),
        Samples(torch.tensor(reference), value(-15.0), value(-15.0), value(5)),
        seed=0,
    )


def test_gain_win_rate_kl_perplexity_and_lengths() -> None:
    result = measured([[1.0, 3.0], [0.0, 2.0]], [[1.0, 2.0], [2.0, 2.0]])
    assert result.gain == pytest.approx(((2 - 1.5) + (1 - 2)) / 2)
    assert result.win_rate == pytest.approx(((0.5 + 0 + 1 + 1) / 4 + (0 + 0 + 0.5 + 0.5) / 4) / 2)
    assert result.kl == pytest.approx(2.0)
    assert result.perplexity == pytest.approx(math.exp(12 / 4))
    assert result.perplexity_reference == pytest.approx(math.exp(15 / 5))
    assert (result.tokens_policy, result.tokens_reference) == (4, 5)


def test_the_interval_covers_the_true_gain_about_95_times_in_100() -> None:
    covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        reference = torch.randn(40, 4, generator=generator)
        policy = torch.randn(40, 4, generator=generator) + 0.3
        result = measured(policy.tolist(), reference.tolist())
        covered += result.gain_low <= 0.3 <= result.gain_high
    assert 180 <= covered <= 199


def test_it_says_so_when_nothing_improved() -> None:
    better, same = [[1.0, 1.1]] * 8, [[0.0, 0.1]] * 8
    assert measured(better, same).verdict.startswith("Improved")
    assert measured(same, same).verdict.startswith("NOT IMPROVED")
    assert measured(same, better).verdict.startswith("WORSE")


def test_the_file_holds_every_number() -> None:
    written = asdict(measured([[1.0]], [[0.0]]))  # as alignment.json is written
    promised = {
        "gain", "gain_low", "gain_high", "reward_policy", "reward_reference", "win_rate", "kl", "perplexity",
        "tokens_policy", "tokens_reference", "seed",
    }  # fmt: skip
    assert promised <= written.keys()
