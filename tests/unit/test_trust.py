"""The trust report says what the weights do, in numbers that can be counted by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from bco_lightning.importance.density_ratio import FittedRatio, K, fit_density_ratio
from bco_lightning.importance.trust import (
    calibration_bins,
    make_report,
    prompt_clusters,
    weight_histogram,
    weight_summary,
    weighted_auc,
)
from bco_lightning.importance.trust_report import TrustReport
from bco_lightning.metrics import clustered_auc

Array = np.ndarray[Any, Any]
CLIP = (0.1, 10.0)


def example(seed: int = 0, num: int = 800, distance: float = 1.0) -> tuple[torch.Tensor, Array, Array, Array]:
    """Features, ups, downs and folds: classes differ in the mean of one feature, some prompts come several times."""
    rng = np.random.default_rng(seed)
    thumbs = rng.random(num) < 0.5
    features = rng.normal(size=(num, 8))
    features[:, 2] += distance * thumbs
    rows = rng.integers(1, 4, num).astype(np.float64)
    return torch.from_numpy(features).float(), rows * thumbs, rows * ~thumbs, rng.integers(0, K, num)


def judged(distance: float, num: int = 800) -> tuple[FittedRatio, TrustReport]:
    features, up, down, folds = example(num=num, distance=distance)
    fitted = fit_density_ratio(features, up, down, folds)
    return fitted, make_report(fitted, features, up, down, folds, np.arange(num) * 10, encoder="synthetic")


@pytest.fixture(scope="module")
def diverging() -> tuple[FittedRatio, TrustReport]:
    return judged(distance=1.0)


def test_the_auc_is_the_closed_form_of_two_gaussians(diverging: tuple[FittedRatio, TrustReport]) -> None:
    area = diverging[1].auc
    assert area is not None
    assert area.low < 0.5 * (1 + math.erf(1 / 2)) < area.high  # Φ(d / √2)
    assert area.high - area.low < 0.12


def test_right_weights_make_the_classes_match_and_no_weights_do_not(
    diverging: tuple[FittedRatio, TrustReport],
) -> None:
    matched, unmatched = diverging[1].matched_auc, diverging[1].auc
    assert matched is not None and unmatched is not None
    assert 0.44 < matched.value < 0.56
    assert unmatched.low > 0.65


def test_numbers_of_the_fit_are_handed_on(diverging: tuple[FittedRatio, TrustReport]) -> None:
    fitted, report = diverging
    assert report.has_evidence and report.evidence == fitted.evidence and report.strengths == fitted.strengths
    assert (report.log_loss, report.constant_log_loss) == (fitted.log_loss, fitted.constant_log_loss)
    assert report.num_prompts == report.num_fitted == 800
    assert report.encoder == "synthetic"
    assert sum(of.count for of in report.calibration) == report.num_up + report.num_down


def test_a_report_with_everything_in_it_comes_back_from_plain_values(
    diverging: tuple[FittedRatio, TrustReport],
) -> None:
    assert TrustReport.from_values(diverging[1].to_values()) == diverging[1]


def test_without_evidence_the_report_describes_weights_of_one() -> None:
    report = judged(distance=0.0, num=300)[1]
    assert not report.has_evidence and not report.why_not
    assert (report.effective_share, report.mass, report.at_low, report.at_high, report.mass_at_high) == (1, 1, 0, 0, 0)
    assert report.matched_auc == report.auc
    assert [share for low, high, share in report.histogram if low <= 1 < high] == [1.0]


def test_without_a_classifier_the_report_says_why() -> None:
    features, up, down, folds = example(num=15)
    report = make_report(
        fit_density_ratio(features, up, down, folds), features, up, down, folds, np.arange(15), encoder="synthetic"
    )
    assert "at least 20 rows of either class" in report.why_not
    assert (report.num_prompts, report.num_fitted, report.auc, report.clusters) == (15, 0, None, ())


def test_the_weighted_area_is_that_of_all_pairs_of_rows_of_a_fold() -> None:
    rng = np.random.default_rng(0)
    scores, folds = rng.integers(0, 6, 30).astype(np.float64), rng.integers(0, 2, 30)
    up, down = rng.integers(0, 3, 30).astype(np.float64), rng.random(30) * (rng.random(30) < 0.7)
    areas = []
    for fold in (np.flatnonzero(folds == number) for number in (0, 1)):
        above = sum(
            up[i] * down[j] * (1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0)
            for i in fold
            for j in fold
        )
        areas.append(above / (up[fold].sum() * down[fold].sum()))
    assert weighted_auc(scores, up, down, folds).value == pytest.approx(np.mean(areas), rel=1e-12)


def test_what_is_left_of_intercepts_does_not_show_in_the_area() -> None:
    up = np.array([9.0, 9.0, 1.0, 1.0])
    scores = np.array([-1.0, -1.0, 1.0, 1.0])  # of folds that were trained on the opposite shares
    assert weighted_auc(scores, up, 10 - up, np.array([0, 0, 1, 1])).value == 0.5


def test_a_row_of_weight_three_is_three_rows_of_one_prompt() -> None:
    rng = np.random.default_rng(1)
    scores, positive = rng.normal(size=40), rng.random(40) < 0.4
    times = rng.integers(1, 5, 40)
    repeated = (np.repeat(values, times) for values in (scores, positive, np.arange(40)))
    assert clustered_auc(scores, positive, np.arange(40), times.astype(float)) == pytest.approx(
        clustered_auc(*repeated), rel=1e-12
    )


def test_the_summary_of_weights_is_that_of_rows_written_out() -> None:
    ratios = np.array([0.02, 0.1, 0.5, 2.0, 10.0, 40.0, 3.0])
    down = np.array([2.0, 1.0, 4.0, 1.0, 1.0, 1.0, 0.0])
    found = weight_summary(np.log(ratios), down, CLIP)
    weights = [0.1] * 3 + [0.5] * 4 + [2.0, 10.0, 10.0]
    assert found["effective_share"] == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights) / 10)
    assert found["mass"] == pytest.approx((2 * 0.02 + 0.1 + 4 * 0.5 + 2 + 10 + 40) / 10)
    assert found["at_low"] == pytest.approx(0.3)
    assert found["at_high"] == pytest.approx(0.2)
    assert found["mass_at_high"] == pytest.approx(20 / sum(weights))


def test_the_histogram_counts_rows_between_even_steps_of_the_logarithm() -> None:
    weights, down = np.array([0.001, 0.06, 1.1, 1.1, 19.0, 500.0]), np.array([1.0, 1.0, 2.0, 3.0, 0.0, 1.0])
    steps = weight_histogram(weights, down)
    lows, highs, shares = map(np.array, zip(*steps, strict=True))
    assert (lows[0], highs[-1]) == pytest.approx((0.05, 20.0))
    np.testing.assert_allclose(highs / lows, 400 ** (1 / 20))
    assert shares[0] == pytest.approx(2 / 8)  # what lies below the first edge is with it
    assert shares[-1] == pytest.approx(1 / 8)
    assert shares[(lows <= 1.1) & (highs > 1.1)] == pytest.approx(5 / 8)
    assert shares.sum() == pytest.approx(1.0)


def test_calibration_bins_are_tenths_of_the_rows_by_prediction() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=100)
    up = (rng.random(100) < 1 / (1 + np.exp(-logits))).astype(np.float64)
    bins = calibration_bins(logits, up, 1 - up)
    for number, of in enumerate(bins):
        rows = np.argsort(logits)[10 * number : 10 * (number + 1)]
        assert of.count == 10
        assert of.predicted == pytest.approx((1 / (1 + np.exp(-logits[rows]))).mean())
        assert of.observed == pytest.approx(up[rows].mean())
    assert len(bins) == 10


def test_the_rows_of_a_prompt_stay_in_one_calibration_bin() -> None:
    up, down = np.array([0.0, 45.0, 1.0, 1.0]), np.array([2.0, 45.0, 0.0, 0.0])
    bins = calibration_bins(np.array([-2.0, 0.0, 1.0, 2.0]), up, down)
    assert [(of.count, of.observed) for of in bins] == [(2.0, 0.0), (90.0, 0.5), (2.0, 1.0)]


def test_clusters_are_the_groups_that_the_prompts_lie_in() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(8), [30, 10, 10, 10, 10, 10, 10, 10])
    centres = 20 * np.eye(8)
    features = torch.from_numpy(centres[groups] + rng.normal(size=(100, 8)))
    up, down = (groups == 0) * 1.0, np.ones(100)
    weighted = np.where(groups == 0, 2.0, 4 / 7)
    clusters = prompt_clusters(features, up, down, weighted, np.arange(100) + 1000)
    assert sorted(of.prompts for of in clusters) == [10] * 7 + [30]
    most = clusters[0]  # the group that thumbs-up rows are in comes first
    assert (most.prompts, most.share_up, most.share_down) == (30, 1.0, 0.3)
    assert most.share_weighted == pytest.approx(60 / 100)
    assert len(most.examples) == 2
    distances = ((features[:30] - features[:30].mean(0)) / features.std(0)).pow(2).sum(1)
    near = distances.argsort()[:2].tolist()
    assert set(most.examples) == {1000 + of for of in near}


def test_few_prompts_make_few_clusters() -> None:
    features, up, down, _ = example(num=25)
    clusters = prompt_clusters(features, up, down, down, np.arange(25))
    assert len(clusters) == 2
    assert sum(of.share_up for of in clusters) == pytest.approx(1.0)
    assert sum(of.share_down for of in clusters) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.parametrize("distance", [0.6, 1.0, 1.4])
def test_right_weights_make_the_classes_match_at_any_distance(distance: float) -> None:
    report = judged(distance, num=3000)[1]
    assert report.auc is not None and report.matched_auc is not None
    assert report.auc.low > 0.6
    assert 0.44 < report.matched_auc.value < 0.57
    assert 0.85 < report.mass < 1.15
    assert all(abs(of.predicted - of.observed) < 0.08 for of in report.calibration)
