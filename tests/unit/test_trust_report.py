"""What the trust report of importance weights says, when it warns, and that nothing is lost on the way to a file."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from bco_lightning.importance.terminal import print_trust
from bco_lightning.importance.trust_report import CalibrationBin, PromptCluster, TrustReport
from bco_lightning.metrics import Auc

HOSTILE = "[bold red]\x1b[31m\u202e<b>"
CLUSTERS = (PromptCluster(70, 0.2, 0.6, 0.25, (3, 8)), PromptCluster(30, 0.8, 0.4, 0.75, (5,)))


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
        "calibration": (CalibrationBin(600.0, 0.61, 0.63), CalibrationBin(600.0, 0.89, 0.87)),
        "histogram": ((0.25, 0.5, 0.0), (0.5, 1.0, 0.2), (1.0, 2.0, 0.8), (2.0, 4.0, 0.0)),
        "effective_share": 0.617,
        "mass": 1.04,
        "at_low": 0.011,
        "at_high": 0.022,
        "mass_at_high": 0.033,
        "matched_auc": Auc(0.52, 0.47, 0.57),
        "clusters": CLUSTERS,
        "seconds": 12.3,
    }
    return TrustReport(**{**values, **changes})


def test_a_report_survives_json() -> None:
    report = trust(num_truncated=7)
    values = json.loads(json.dumps(report.to_values(), allow_nan=False))
    assert values.keys() == {field.name for field in fields(TrustReport)}
    assert TrustReport.from_values(values) == report


def test_what_is_not_known_is_null_in_json_and_comes_back_as_not_known() -> None:
    unknown = TrustReport("reference", 3.0, 2.0, 5, 0, why_not="too few rows")
    values = json.loads(json.dumps(unknown.to_values(), allow_nan=False))
    assert values["log_loss"] is None
    assert values["auc"] is None
    read = TrustReport.from_values(values)
    assert math.isnan(read.log_loss)
    assert math.isnan(read.constant_log_loss)
    assert (read.auc, read.matched_auc, read.why_not) == (None, None, "too few rows")


def test_numbers_that_are_not_finite_within_lists_are_null_too() -> None:
    report = trust(calibration=(CalibrationBin(0.0, 0.5, math.nan),), mass=math.inf)
    read = TrustReport.from_values(json.loads(json.dumps(report.to_values(), allow_nan=False)))
    assert math.isnan(read.calibration[0].observed)
    assert math.isnan(read.mass)


def test_a_value_that_is_missing_or_not_known_is_refused() -> None:
    values = trust().to_values()
    with pytest.raises(KeyError, match="auc"):
        TrustReport.from_values({name: value for name, value in values.items() if name != "auc"})
    with pytest.raises(TypeError, match="surprise"):
        TrustReport.from_values({**values, "surprise": 1})


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


def test_sound_weights_are_not_warned_of() -> None:
    assert trust().warnings == []


@pytest.mark.parametrize(
    ("changes", "found", "remedy"),
    [
        ({"effective_share": 0.099}, "9.9% of their number", "model.importance_clip"),
        ({"matched_auc": Auc(0.66, 0.601, 0.7)}, "0.660 (0.601 to 0.700)", "model.prompt_features.encoder"),
        ({"mass": 1.26}, "mean 1.26", "model.importance_weights: off"),
        ({"mass": 0.79}, "mean 0.79", "model.importance_weights: off"),
        ({"mass_at_high": 0.251}, "25.1% of the weight", "model.importance_clip"),
        ({"num_truncated": 1}, "1 of 1,234", "model.prompt_features.encoder: reference"),
    ],
)
def test_what_is_wrong_is_warned_of_with_a_remedy(changes: dict[str, Any], found: str, remedy: str) -> None:
    (warning,) = trust(**changes).warnings
    assert found in warning
    assert remedy in warning


@pytest.mark.parametrize(
    "changes",
    [
        {"effective_share": 0.1},
        {"matched_auc": Auc(0.66, 0.6, 0.7)},
        {"matched_auc": None},
        {"mass": 0.8},
        {"mass": 1.25},
        {"mass_at_high": 0.25},
    ],
)
def test_what_is_just_sound_is_not_warned_of(changes: dict[str, Any]) -> None:
    assert trust(**changes).warnings == []


def test_a_density_ratio_whose_mean_is_not_known_is_warned_of() -> None:
    assert len(trust(mass=math.nan).warnings) == 1


def test_weights_that_are_all_1_are_not_warned_of_but_cut_prompts_are() -> None:
    bad = {"effective_share": 0.01, "mass": 9.0, "mass_at_high": 0.9, "matched_auc": Auc(0.9, 0.8, 1.0)}
    (warning,) = trust(**bad, num_truncated=5, has_evidence=False).warnings
    assert "5 of 1,234" in warning


# --- terminal


def printed(report: TrustReport, texts: dict[int, str] | None = None, width: int = 120, encoding: str = "utf-8") -> str:
    class Out(StringIO):
        @property
        def encoding(self) -> str:  # type: ignore[override]
            return encoding

    out = Out()
    print_trust(report, Console(file=out, width=width), texts)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_every_number_is_printed_and_no_line_is_too_long(width: int) -> None:
    text = printed(trust(num_truncated=7), width=width)
    for said in (
        *("reference, layer 3", "900 up, 300 down", "1,234, 1,200 of them", "0.710 (0.670 to 0.750)", "0.5123; 0.5623"),
        *("9.5", "0.001, 0.01", "0.630", "61.7%", "1.040", "1.1%, 2.2%", "3.3%", "0.520 (0.470 to 0.570)", "12.3 s"),
        *("0.5 to 1", "80.0%", "75.0%"),
    ):
        assert said in text
    assert max(map(len, text.splitlines())) <= width


def test_the_verdict_and_then_warnings_come_last() -> None:
    text = " ".join(printed(trust(mass=3.0)).split())
    assert text.index("75.0%") < text.index("Prompts tell thumbs-up") < text.index("warning: The density ratio")
    assert text.endswith(trust(mass=3.0).warnings[-1])


def test_bars_are_as_long_as_shares_and_begin_where_there_are_rows() -> None:
    lines = printed(trust()).splitlines()
    bars = {line.split()[1]: line.count("█") for line in lines if " to " in line and "█" in line}
    assert bars == {"0.5": 8, "1": 30}  # 0.2 / 0.8 of 30, rounded up
    assert not any("0.25 to 0.5" in line or "2 to 4" in line for line in lines)


def test_a_terminal_of_ascii_gets_ascii() -> None:
    text = printed(trust(mass=3.0, num_truncated=3), encoding="ascii")
    assert text.isascii()
    assert "#" * 30 in text


def test_clusters_that_gain_come_first() -> None:
    text = printed(trust())
    assert text.index("40.0%") < text.index("60.0%")


def test_examples_are_printed_only_where_texts_are_given_and_steer_nothing() -> None:
    texts = {8: f"how to {HOSTILE}", 99: "of no cluster"}
    assert "how to [bold red]\ufffd[31m\ufffd<b>" in printed(trust(), texts)
    assert "of no cluster" not in printed(trust(), texts)
    assert "\x1b" not in printed(trust(), texts)
    assert "examples" not in printed(trust())


def test_where_all_weights_are_1_no_number_of_weights_is_printed() -> None:
    text = printed(trust(has_evidence=False, clusters=()))
    assert "0.710 (0.670 to 0.750)" in text
    for said in ("61.7%", "clip", "█", "Clusters"):
        assert said not in text


def test_where_nothing_could_be_fitted_the_reason_is_printed() -> None:
    text = printed(TrustReport("reference", 3.0, 2.0, 5, 0, why_not="expected 20 rows, found 2"))
    assert "not known: expected 20 rows, found 2" in text
    assert "nan" not in text
