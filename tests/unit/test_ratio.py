"""Importance weights are the density ratio of prompts where there is one, and exactly 1 where none was shown."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch

from bco_lightning.importance.ratio import FittedRatio, K, fit_density_ratio

Array = np.ndarray[Any, Any]


class Prompts:
    """Synthetic prompts: features, rows of either thumb, folds, and the true log density ratio."""

    def __init__(self, features: Array, up: Array, down: Array, truth: Array, seed: int) -> None:
        self.features = torch.from_numpy(features).float()
        self.up, self.down, self.truth = up.astype(np.float64), down.astype(np.float64), truth
        self.folds = np.random.default_rng([7, seed]).integers(0, K, len(up))

    def fit(self, **options: Any) -> FittedRatio:
        return fit_density_ratio(self.features, self.up, self.down, self.folds, **options)


@cache
def known_fit() -> FittedRatio:
    """Of 300 prompts, for tests that only read it."""
    return shifted_gaussians(num=300).fit()


def same_prompts(seed: int, num: int = 200, num_features: int = 8, share_up: float = 0.5, rows: Any = 1) -> Prompts:
    """Thumbs that do not depend on the prompt."""
    rng = np.random.default_rng(seed)
    counts = np.broadcast_to(rows, num)
    up = rng.binomial(counts, share_up)
    return Prompts(rng.normal(size=(num, num_features)), up, counts - up, np.zeros(num), seed)


def shifted_gaussians(seed: int = 0, num: int = 1000, share_up: float = 0.5, distance: float = 1.5) -> Prompts:
    """Ups from N(d, 1), downs from N(0, 1) along one of 16 features: the log ratio is d x - d² / 2."""
    rng = np.random.default_rng(seed)
    up = rng.random(num) < share_up
    features = rng.normal(size=(num, 16))
    features[:, 3] += distance * up
    return Prompts(features, up, ~up, distance * features[:, 3] - distance**2 / 2, seed)


def logistic_propensity(seed: int = 0, num: int = 1000) -> Prompts:
    """Several rows a prompt, thumbs-up with probability σ(a·x); by symmetry the base rate is one half."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num, 16))
    logits = features[:, :4].sum(axis=1) * 0.6
    rows = rng.integers(1, 4, num)
    up = rng.binomial(rows, 1 / (1 + np.exp(-logits)))
    return Prompts(features, up, rows - up, logits, seed)


def fifty_rows_of_one(num: int = 200) -> Array:
    return np.where(np.arange(num) == 0, 50, 1 + np.arange(num) % 3)


def false_alarms(seeds: range, **options: Any) -> int:
    alarms = 0
    for seed in seeds:
        fitted = same_prompts(seed, **options).fit()
        assert not fitted.report.why_not
        weights = fitted.ratio.weights(fitted.log_ratios_P)
        assert fitted.ratio.has_evidence or torch.equal(weights, torch.ones(len(weights)))
        alarms += fitted.ratio.has_evidence
    return alarms


@pytest.mark.parametrize("options", [{}, {"share_up": 0.15}, {"rows": fifty_rows_of_one()}])
def test_without_divergence_all_weights_are_exactly_one(options: dict[str, Any]) -> None:
    assert false_alarms(range(1), **options) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_up": 0.1, "num": 400},
        {"rows": fifty_rows_of_one()},
        {"num_features": 1},
        {"num_features": 300},
        {"num": 60},
    ],
    ids=["plain", "few thumbs up", "one prompt has 50 rows", "one feature", "more features than prompts", "60 prompts"],
)
def test_of_twenty_data_sets_without_divergence_one_at_most_makes_an_alarm(options: dict[str, Any]) -> None:
    assert false_alarms(range(100, 120), **options) <= 1


def test_rows_of_one_prompt_that_agree_are_no_evidence() -> None:
    rng = np.random.default_rng(0)
    rows = np.where(np.arange(200) < 4, 50, 1)
    thumbs = rng.random(200) < 0.5
    prompts = Prompts(rng.normal(size=(200, 16)), rows * thumbs, rows * ~thumbs, np.zeros(200), 0)
    assert not prompts.fit().ratio.has_evidence


@pytest.mark.parametrize(
    "prompts",
    [shifted_gaussians(), shifted_gaussians(num=2000, share_up=0.1), logistic_propensity()],
    ids=["gaussians", "gaussians, few thumbs up", "propensity"],
)
def test_a_known_divergence_is_found(prompts: Prompts) -> None:
    fitted = prompts.fit()
    assert fitted.ratio.has_evidence
    assert np.corrcoef(fitted.log_ratios_P, prompts.truth)[0, 1] > 0.8
    assert 0.9 < np.average(np.exp(fitted.log_ratios_P.numpy()), weights=prompts.down) < 1.1
    assert fitted.report.log_loss < fitted.report.constant_log_loss


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("kind", [partial(shifted_gaussians, num=3000, distance=1.0), logistic_propensity])
def test_a_known_divergence_is_found_with_every_seed(kind: Any, seed: int) -> None:
    test_a_known_divergence_is_found(kind(seed))


def test_a_divergence_is_found_among_more_features_than_axes() -> None:
    prompts = shifted_gaussians(num=300)
    hidden = np.random.default_rng(1).normal(size=(16, 300))
    prompts.features = prompts.features @ torch.from_numpy(hidden).float() + 100.0
    fitted = prompts.fit()
    assert fitted.ratio.coefficients_KH.shape == (K, 300)
    assert np.corrcoef(fitted.log_ratios_P, prompts.truth)[0, 1] > 0.8


def test_weights_have_mean_one_over_the_downs_and_keep_to_the_clip() -> None:
    prompts = logistic_propensity()
    fitted = prompts.fit(clip=(0.5, 2.0))
    weights = fitted.ratio.weights(fitted.log_ratios_P)
    assert weights.dtype == torch.float32
    assert np.average(weights, weights=prompts.down) == pytest.approx(1.0, abs=1e-6)
    ratios = weights.double() * fitted.ratio.normaliser
    assert ratios.min().item() == pytest.approx(0.5, rel=1e-6)
    assert ratios.max().item() == pytest.approx(2.0, rel=1e-6)


def test_losses_are_those_of_predictions_with_the_base_rate_of_the_other_folds() -> None:
    prompts = logistic_propensity(num=300)
    fitted = prompts.fit()
    loss = constant = 0.0
    for up, down, fold, log_ratio in zip(prompts.up, prompts.down, prompts.folds, fitted.log_ratios_P, strict=True):
        others = prompts.folds != fold
        base = math.log(prompts.up[others].sum() / prompts.down[others].sum())
        logit = base + float(log_ratio)
        loss += up * math.log1p(math.exp(-logit)) + down * math.log1p(math.exp(logit))
        constant += up * math.log1p(math.exp(-base)) + down * math.log1p(math.exp(base))
    num_rows = prompts.up.sum() + prompts.down.sum()
    assert fitted.report.log_loss == pytest.approx(loss / num_rows, rel=1e-6)
    assert fitted.report.constant_log_loss == pytest.approx(constant / num_rows, rel=1e-6)


def test_ratios_of_a_fold_do_not_know_its_thumbs() -> None:
    prompts = shifted_gaussians(num=300)
    before = known_fit()
    own = prompts.folds == 2
    prompts.up[own], prompts.down[own] = prompts.down[own], 3 * prompts.up[own]
    after = prompts.fit()
    assert torch.equal(before.log_ratios_P[own], after.log_ratios_P[own])
    assert before.report.strengths[2] == after.report.strengths[2]
    assert not torch.equal(before.log_ratios_P[~own], after.log_ratios_P[~own])


def test_the_same_input_gives_the_same_bits() -> None:
    first, second = known_fit(), shifted_gaussians(num=300).fit()
    assert torch.equal(first.log_ratios_P, second.log_ratios_P)
    assert first.ratio.normaliser == second.ratio.normaliser


def test_neither_scale_nor_offset_nor_a_constant_among_features_matters() -> None:
    prompts = shifted_gaussians(num=300)
    prompts.features = prompts.features * torch.logspace(-3, 3, 16) + torch.linspace(-1e-3, 1e-3, 16)
    prompts.features = torch.cat([prompts.features, torch.full((300, 1), 0.1)], dim=1)
    torch.testing.assert_close(prompts.fit().log_ratios_P, known_fit().log_ratios_P, rtol=1e-3, atol=1e-3)


def test_a_new_prompt_is_judged_by_the_linear_formula_of_its_fold_in_float32_even_under_autocast() -> None:
    ratio = known_fit().ratio
    features = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    keys = torch.arange(-20, 20)  # the fold of a key below 0 is the same for NumPy and PyTorch
    expected = [
        float((x.double() - ratio.mean_H) @ ratio.coefficients_KH[k % K] + ratio.intercepts_K[k % K])
        for x, k in zip(features, keys.tolist(), strict=True)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        found = ratio.log_ratios(features, keys)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def small(**changes: Any) -> Prompts:
    prompts = shifted_gaussians(num=200)
    for name, values in changes.items():
        setattr(prompts, name, values)
    return prompts


with_nan = small().features
with_nan[17, 3] = math.nan
ones, nothing, first = np.ones(200), np.zeros(200), (np.arange(200) == 0).astype(float)
FAULTS = {
    "20 rows": (shifted_gaussians(num=20), r"at least 20 rows of either class, found \d+ up and \d+ down"),
    "1 thumbs-down": (small(up=ones - first, down=first), "at least 20 rows of either class, found 199 up and 1 down"),
    "only thumbs-down": (small(up=nothing, down=ones), "found 0 up and 200 down"),
    "1 prompt": (
        Prompts(np.ones((1, 16)), np.array([50]), np.array([50]), np.zeros(1), 0),
        "at least 50 distinct prompts, found 1",
    ),
    "4 prompts with thumbs-down": (
        small(up=ones, down=50.0 * (np.arange(200) < 4)),
        "at least 5 distinct prompts with rows of either class, found 200 with thumbs up and 4 with thumbs down",
    ),
    "thumbs-up in 2 folds": (
        small(
            folds=np.arange(200) % K,
            up=(np.arange(200) % K < 2).astype(float),
            down=(np.arange(200) % K >= 2).astype(float),
        ),
        "at least 3 of 5 folds",
    ),
    "constant features": (small(features=torch.full((200, 16), 0.1)), "features that differ from prompt to prompt"),
    "a NaN": (small(features=with_nan), "finite features of prompts, found others in 1 of 200 prompts"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_data_that_no_classifier_can_be_fitted_to_have_weights_of_one_and_say_why(fault: str) -> None:
    prompts, why = FAULTS[fault]
    fitted = prompts.fit()
    assert fitted.report.why_not.startswith("expected ")
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(fitted.report.why_not)
    assert torch.equal(fitted.ratio.weights(fitted.log_ratios_P), torch.ones(len(prompts.up)))
