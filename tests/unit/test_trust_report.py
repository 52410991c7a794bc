"""The trust report says what the weights do, in numbers that can be counted by hand, when it warns, and where to."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bco_lightning.callbacks.run_checkpoint import run_folder_of
from bco_lightning.callbacks.run_header import show_trust
from bco_lightning.importance.ratio import (
    K,
    calibration_bins,
    fit_density_ratio,
    weight_histogram,
    weight_summary,
    weighted_auc,
)
from bco_lightning.importance.report import TrustReport, print_trust
from bco_lightning.metrics import Auc
from tests.conftest import tiny_trainer


def trust(**changes: Any) -> TrustReport:
    """A report of weights that are sound."""
    values: dict[str, Any] = {
        "encoder": "reference, layer 3",
        "num_up": 900.0,
        "num_down": 300.0,
        "num_prompts": 1234,
        "num_fitted": 1200,
        "has_evidence": True,
        "evidence": 9.5,
        "auc": Auc(0.71, 0.67, 0.75),
        "log_loss": 0.51234,
        "constant_log_loss": 0.56234,
        "strengths": (0.001, 0.01),
        "calibration": ((600.0, 0.61, 0.63), (600.0, 0.89, 0.87)),
        "histogram": ((0.25, 0.5, 0.0), (0.5, 1.0, 0.2), (1.0, 2.0, 0.8), (2.0, 4.0, 0.0)),
        "effective_share": 0.617,
        "mass": 1.04,
        "at_low": 0.011,
        "at_high": 0.022,
        "mass_at_high": 0.033,
        "matched_auc": Auc(0.52, 0.47, 0.57),
        "seconds": 12.3,
    }
    return TrustReport(**{**values, **changes})


UNKNOWN = TrustReport("reference", 3.0, 2.0, 5, 0, why_not="expected 20 rows, found 2")

# --- what is computed


def judged(distance: float, num: int = 800) -> TrustReport:
    """Classes that differ in the mean of one feature; some prompts come several times."""
    rng = np.random.default_rng(0)
    thumbs = rng.random(num) < 0.5
    features = rng.normal(size=(num, 8))
    features[:, 2] += distance * thumbs
    rows = rng.integers(1, 4, num).astype(np.float64)
    counts = rows * thumbs, rows * ~thumbs, rng.integers(0, K, num)
    return fit_density_ratio(torch.from_numpy(features).float(), *counts).report


def test_areas_are_the_closed_form_of_two_gaussians_and_with_right_weights_one_half() -> None:
    report = judged(distance=1.0)
    assert report.auc is not None and report.matched_auc is not None
    assert report.auc.low < 0.5 * (1 + math.erf(1 / 2)) < report.auc.high  # Φ(d / √2)
    assert report.auc.low > 0.65
    assert report.auc.high - report.auc.low < 0.12
    assert 0.44 < report.matched_auc.value < 0.56
    assert report.has_evidence
    assert report.num_prompts == report.num_fitted == 800
    assert sum(count for count, _, _ in report.calibration) == report.num_up + report.num_down
    assert TrustReport.from_values(json.loads(json.dumps(asdict(report), allow_nan=False))) == report


def test_without_evidence_the_report_describes_weights_of_one() -> None:
    report = judged(distance=0.0, num=300)
    assert not report.has_evidence and not report.why_not
    assert (report.effective_share, report.mass, report.at_low, report.at_high, report.mass_at_high) == (1, 1, 0, 0, 0)
    assert report.matched_auc == report.auc
    assert [share for low, high, share in report.histogram if low <= 1 < high] == [1.0]


def test_without_a_classifier_the_report_says_why() -> None:
    report = judged(distance=1.0, num=15)
    assert "at least 20 rows of either class" in report.why_not
    assert (report.num_prompts, report.num_fitted, report.auc) == (15, 0, None)


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


def test_the_summary_of_weights_is_that_of_rows_written_out() -> None:
    ratios = torch.tensor([0.02, 0.1, 0.5, 2.0, 10.0, 40.0, 3.0], dtype=torch.float64)
    found = weight_summary(ratios.log(), np.array([2.0, 1.0, 4.0, 1.0, 1.0, 1.0, 0.0]), (0.1, 10.0))
    weights = [0.1] * 3 + [0.5] * 4 + [2.0, 10.0, 10.0]
    assert found == pytest.approx(
        {
            "effective_share": sum(weights) ** 2 / sum(w * w for w in weights) / 10,
            "mass": (2 * 0.02 + 0.1 + 4 * 0.5 + 2 + 10 + 40) / 10,
            "at_low": 0.3,
            "at_high": 0.2,
            "mass_at_high": 20 / sum(weights),
        }
    )


def test_the_histogram_counts_rows_between_even_steps_of_the_logarithm() -> None:
    steps = weight_histogram(np.array([0.001, 0.06, 1.1, 1.1, 19.0, 500.0]), np.array([1.0, 1.0, 2.0, 3.0, 0.0, 1.0]))
    lows, highs, shares = map(np.array, zip(*steps, strict=True))
    assert (lows[0], highs[-1]) == pytest.approx((0.05, 20.0))
    np.testing.assert_allclose(highs / lows, 400 ** (1 / 20))
    assert (shares[0], shares[-1]) == pytest.approx((2 / 8, 1 / 8))  # the ends take the rest
    assert shares[(lows <= 1.1) & (highs > 1.1)] == pytest.approx(5 / 8)
    assert shares.sum() == pytest.approx(1.0)


def test_calibration_bins_are_tenths_of_the_rows_by_prediction() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=100)
    up = (rng.random(100) < 1 / (1 + np.exp(-logits))).astype(np.float64)
    bins = calibration_bins(logits, up, 1 - up)
    for number, of in enumerate(bins):
        rows = np.argsort(logits)[10 * number : 10 * (number + 1)]
        assert of == pytest.approx((10, (1 / (1 + np.exp(-logits[rows]))).mean(), up[rows].mean()))
    assert len(bins) == 10


def test_the_rows_of_a_prompt_stay_in_one_calibration_bin() -> None:
    up, down = np.array([0.0, 45.0, 1.0, 1.0]), np.array([2.0, 45.0, 0.0, 0.0])
    bins = calibration_bins(np.array([-2.0, 0.0, 1.0, 2.0]), up, down)
    assert [(count, observed) for count, _, observed in bins] == [(2.0, 0.0), (90.0, 0.5), (2.0, 1.0)]


@pytest.mark.slow
@pytest.mark.parametrize("distance", [0.6, 1.0, 1.4])
def test_right_weights_make_the_classes_match_at_any_distance(distance: float) -> None:
    report = judged(distance, num=3000)
    assert report.auc is not None and report.matched_auc is not None
    assert report.auc.low > 0.6
    assert 0.44 < report.matched_auc.value < 0.57
    assert 0.85 < report.mass < 1.15
    assert all(abs(predicted - observed) < 0.08 for _, predicted, observed in report.calibration)


# --- what is said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "are worth 61.7% of their number"),
        ({"has_evidence": False}, "held-out log loss 0.5123, that of a constant 0.5623"),
        ({"has_evidence": False, "why_not": "found one prompt"}, "could be fitted: found one prompt."),
    ],
)
def test_the_verdict_is_one_sentence(changes: dict[str, Any], words: str) -> None:
    verdict = trust(**changes).verdict
    assert words in verdict
    assert verdict.endswith((".", ")."))
    assert ". " not in verdict
    assert verdict.startswith("All importance weights are 1") == bool(changes)


@pytest.mark.parametrize(
    ("wrong", "found", "remedy", "sound"),
    [
        ({"effective_share": 0.099}, "9.9% of their number", "model.importance_clip", {"effective_share": 0.1}),
        (
            {"matched_auc": Auc(0.66, 0.601, 0.7)}, "0.660 (0.601 to 0.700)", "model.prompt_features.encoder",
            {"matched_auc": Auc(0.66, 0.6, 0.7)},
        ),
        ({"mass": 1.26}, "mean 1.26", "model.importance_weights: off", {"mass": 1.25}),
        ({"mass": 0.79}, "mean 0.79", "model.importance_weights: off", {"mass": 0.8}),
        ({"mass_at_high": 0.251}, "25.1% of the weight", "model.importance_clip", {"mass_at_high": 0.25}),
        ({"num_truncated": 1}, "1 of 1,234", "model.prompt_features.encoder: reference", {"num_truncated": 0}),
    ],
)  # fmt: skip
def test_what_is_wrong_is_warned_of_with_a_remedy(
    wrong: dict[str, Any], found: str, remedy: str, sound: dict[str, Any]
) -> None:
    (warning,) = trust(**wrong).warnings
    assert found in warning
    assert remedy in warning
    assert trust(**sound).warnings == []


def test_weights_that_are_all_1_are_not_warned_of_but_cut_prompts_are() -> None:
    bad = {"effective_share": 0.01, "mass": 9.0, "mass_at_high": 0.9, "matched_auc": Auc(0.9, 0.8, 1.0)}
    (warning,) = trust(**bad, num_truncated=5, has_evidence=False).warnings
    assert "5 of 1,234" in warning


# --- where to


def printed(report: TrustReport) -> str:
    out = StringIO()
    print_trust(report, Console(file=out, width=80))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    return " ".join(out.getvalue().split())


def test_every_number_is_printed_and_the_verdict_and_warnings_come_last() -> None:
    report = trust(num_truncated=7)
    text = printed(report)
    for said in (
        *("reference, layer 3", "900 up, 300 down", "1,234, 1,200 of them", "0.710 (0.670 to 0.750)", "0.5123; 0.5623"),
        *("9.5", "0.001, 0.01", "61% 63%, 89% 87%", "61.7%", "1.040", "1.1%, 2.2%", "3.3%", "0.520 (0.470 to 0.570)"),
    ):
        assert said in text
    assert text.endswith(f"{report.verdict} warning: {report.warnings[-1]}")


def test_what_is_not_there_is_not_printed() -> None:
    even, unknown = printed(trust(has_evidence=False)), printed(UNKNOWN)
    assert "0.710 (0.670 to 0.750)" in even
    assert not [said for said in ("61.7%", "clip") if said in even]
    assert "not known: expected 20 rows, found 2" in unknown
    assert "None" not in unknown


def logged(folder: Path, report: TrustReport) -> EventAccumulator:
    """What a run leaves in its folder and in TensorBoard."""
    trainer = tiny_trainer(logger=[TensorBoardLogger(folder), CSVLogger(folder / "csv")])
    show_trust(trainer, report, run_folder_of(trainer))
    for logger in trainer.loggers:
        logger.finalize("success")
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    return events


def test_a_run_starts_with_the_report_in_the_terminal_in_every_logger_and_in_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = trust(mass=3.0)
    events = logged(tmp_path, report)
    assert "are worth 61.7% of their number" in " ".join(capsys.readouterr().out.split())
    scalars = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    expected = {"auc": 0.71, "log_loss": 0.51234, "constant_log_loss": 0.56234, "effective_share": 0.617, "mass": 3.0,
                "at_low": 0.011, "at_high": 0.022, "matched_auc": 0.52}  # fmt: skip
    assert scalars == {f"importance/{name}": pytest.approx(value) for name, value in expected.items()}
    assert len(events.Images("importance/weights")) == 1
    (text,) = events.Tensors("importance/verdict/text_summary")[0].tensor_proto.string_val
    lines = text.decode().splitlines()
    assert lines[2] == f"| verdict | {report.verdict} |"
    assert f"| warning | {report.warnings[0]} |" in lines
    assert {line.count("|") for line in lines if line.startswith("|")} == {3}
    assert "importance/effective_share" in next(tmp_path.rglob("metrics.csv")).read_text(encoding="utf-8")
    values = json.loads(next(tmp_path.rglob("importance.json")).read_text(encoding="utf-8"))
    assert TrustReport.from_values(values) == report


def test_what_is_not_known_is_left_out_of_numbers_and_null_in_the_file(tmp_path: Path) -> None:
    events = logged(tmp_path, UNKNOWN)
    names = {tag.removeprefix("importance/") for tag in events.Tags()["scalars"]}
    assert names == {"effective_share", "mass", "at_low", "at_high"}
    values = json.loads(next(tmp_path.rglob("importance.json")).read_text(encoding="utf-8"))
    assert values["log_loss"] is None
    assert TrustReport.from_values(values) == UNKNOWN
