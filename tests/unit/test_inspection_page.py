"""How the report of `inspect` is shown: whole, true to its numbers, and never as code of those who wrote the rows."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bco_lightning.data.row_counts import Counted, FeedbackSummary, RowCounts
from bco_lightning.errors import ConfigError
from bco_lightning.inspection import pictures
from bco_lightning.inspection.cost import Cost, Work
from bco_lightning.inspection.data_report import DataReport, Example, Finding
from bco_lightning.inspection.lengths import Histogram, Lengths, length_bias
from bco_lightning.inspection.page import page_of, write_page
from bco_lightning.inspection.personal_data import Hits
from bco_lightning.inspection.prompts import PromptShift
from bco_lightning.inspection.terminal import print_report
from bco_lightning.metrics import Auc
from tests.unit.test_trust_report import trust

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" & 'so' {{ 7 * 7 }} [bold]\x1b[31m"
VOID = {"meta", "br", "img", "link", "input"}


def report(**changes: Any) -> DataReport:
    lengths, up = np.arange(1, 101), np.arange(100) < 70
    counts = RowCounts(
        "train",
        read=130,
        up=70,
        down=30,
        left_out={"no feedback": Counted(17, [f"{HOSTILE}.jsonl:1"]), "rating left at its default": Counted(9, [])},
        cut={"prompts cut": 3, "completions cut": 0},
        malformed=Counted(4, ["/home/ann/day/log.jsonl:5"]),
        by_source={f"logs/{HOSTILE}": (50, 10), "other": (20, 20)},
    )
    made = DataReport(
        model=f"model {HOSTILE}",
        counts=(counts, RowCounts("validation", read=11, up=6, down=5)),
        feedback=FeedbackSummary(100, 13, 2, {}),
        prompt_lengths=Lengths.of(lengths, up),
        completion_lengths=Lengths.of(lengths * 3, up),
        limits={"data.max_length": 256, "data.max_prompt_length": 64},
        over_limits={"data.max_length": 15, "data.max_prompt_length": 36},
        cost=Cost(Work(100, 20_000, 9_000, 5e6), 16, 7, 7, 1e12, (80.0, 1140.0), "this CPU"),
        prompts=PromptShift(100, 77, Auc(0.64, 0.55, 0.73), 0.66, tuple(np.linspace(0, 1, 51))),
        prompt_bias=Auc(0.7, 0.6, 0.8),
        bias=length_bias(lengths, up, lengths),
        personal_data={"e-mail addresses": Hits(21, 22), "IBANs": Hits(0, 0)},
        examples=(Example(True, "log.jsonl:1", HOSTILE, f"answer {HOSTILE}"),),
    )
    return replace(made, **changes)


class Elements(HTMLParser):
    """Every element of a page with its attributes; refuses tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_what_users_wrote_is_text_on_the_page_and_nothing_else() -> None:
    page = page_of(report())
    elements = Elements(page).found
    assert {tag for tag, _ in elements} & {"script", "img", "iframe", "object", "link"} == set()
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    assert page.count("&lt;script&gt;alert(1)") >= 5  # model, source, its bar, prompt, completion
    assert "{{ 7 * 7 }}" in page
    assert "\x1b" not in page


def test_the_page_needs_nothing_but_itself() -> None:
    page = page_of(report())
    for _, attributes in Elements(page).found:
        assert not {"src", "href", "srcset"} & attributes.keys()
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"https?://", page)


def test_every_number_of_the_rows_is_on_the_page_and_in_the_terminal() -> None:
    page, terminal = page_of(report()), printed(report())
    for said in ("130", "17", "no feedback", "rating left at its default", "day/log.jsonl:5", "validation", "13"):
        assert said in page
        assert said in terminal
    assert "/home/ann" not in page + terminal
    for said in ("0.640 (0.550 to 0.730)", "0.6600; 0.6931", "1.3 to 19 min", "21"):
        assert said in page
        assert said in terminal


def printed(of: DataReport, width: int = 200) -> str:
    out = StringIO()
    print_report(of, Console(file=out, width=width))
    return out.getvalue()


def test_what_users_wrote_is_no_markup_of_the_terminal() -> None:
    text = printed(report())
    assert "[bold]" in text
    assert "\x1b" not in text


def test_hidden_examples_are_neither_on_the_page_nor_in_the_terminal() -> None:
    hidden = report(examples=())
    assert "answer" in page_of(report())
    assert "answer &lt;script" not in page_of(hidden)
    assert "Examples" not in page_of(hidden)
    assert "Examples" not in printed(hidden)


def test_pictures_have_a_name_for_those_who_do_not_see_them() -> None:
    page = page_of(report())
    drawn = re.findall(r"<svg [^>]*role=\"img\"[^>]*><title>[^<]+</title>", page)
    assert len(drawn) == page.count("<svg") == 7


@pytest.mark.parametrize("limit", [64, 100_000])
def test_a_limit_is_a_line_where_it_is_in_the_picture_and_words_beyond(limit: int) -> None:
    histogram = Histogram.of(np.arange(1, 101), np.arange(100) < 50)
    picture = str(pictures.length_histogram(histogram, "prompt", {"data.max_length": limit}))
    assert ('class="limit"' in picture) == (limit == 64)
    assert f"data.max_length {limit:,}" in picture


def test_bars_are_as_long_as_their_numbers() -> None:
    picture = str(pictures.bars({"a": 100, "b": 25}, of=200))
    widths = [float(width) for width in re.findall(r'width="([\d.]+)"', picture)]
    assert widths[1] / widths[0] == pytest.approx(0.25)
    assert "25 · 12.5%" in picture


def test_a_report_of_one_class_without_an_end_or_a_time_is_shown_too() -> None:
    lengths, up = np.array([5, 5]), np.array([True, True])
    bare = report(
        prompt_lengths=Lengths.of(lengths, up),
        completion_lengths=Lengths.of(lengths, up),
        bias=length_bias(lengths, up, lengths),
        prompts=PromptShift(2, 1, why_not="expected more"),
        prompt_bias=None,
        cost=Cost(Work(2, 10, 5, 50), 16, 1, None, why_not="no shape"),
        counts=(RowCounts("train", read=2, up=2, by_source={"log": (2, 0)}),),
        notes=(Finding("problem", "fit would not start"),),
        feedback=None,
    )
    for text in (page_of(bare), printed(bare)):
        assert "no shape" in text
        assert "expected more" in text
        assert "fit would not start" in text
    assert bare.findings[0].level == "problem"


def test_findings_come_worst_first() -> None:
    order = ["problem", "warning", "note", "good"]
    levels = [finding.level for finding in report(notes=(Finding("problem", "x"),)).findings]
    assert levels == sorted(levels, key=order.index)
    assert {"problem", "warning", "note"} <= set(levels)


def test_a_page_that_cannot_be_written_is_an_error_of_the_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--report: expected a file to write"):
        write_page(report(), tmp_path / "gone" / "page.html")


def test_examples_are_shown_with_their_thumb_and_place() -> None:
    page = page_of(report())
    assert re.search(r'class="example up">\s*<div[^>]*>thumbs-up, log.jsonl:1</div>', page)


# --- importance weights


def test_without_importance_weights_there_is_no_section_of_them() -> None:
    assert "<h2>Importance weights</h2>" not in page_of(report())
    assert "Importance weights of" not in printed(report())
    assert report().prompts.verdict in [finding.text for finding in report().findings]


def test_numbers_of_importance_weights_are_on_the_page_and_in_the_terminal() -> None:
    weighted = report(trust=trust())
    for text in (page_of(weighted), printed(weighted)):
        for said in ("reference, layer 3", "0.710 (0.670 to 0.750)", "0.5123; 0.5623", "61.7%", "12.3 s"):
            assert said in text


def test_findings_have_the_verdict_and_the_warnings_of_the_weights_themselves() -> None:
    weighted = report(trust=trust(mass=3.0))
    found = [(finding.level, finding.text) for finding in weighted.findings]
    assert ("note", trust().verdict) in found
    assert ("warning", trust(mass=3.0).warnings[0]) in found
    assert weighted.prompts.verdict not in [text for _, text in found]


def test_weights_that_are_all_1_for_want_of_a_difference_are_a_good_finding() -> None:
    even = trust(has_evidence=False)
    levels = {finding.text: finding.level for finding in report(trust=even).findings}
    assert levels[even.verdict] == "good"


def test_the_name_of_an_encoder_is_text_on_the_page_and_in_the_terminal_and_nothing_else() -> None:
    weighted = report(trust=trust(encoder=HOSTILE))
    page, terminal = page_of(weighted), printed(weighted)
    elements = Elements(page).found
    assert {tag for tag, _ in elements} & {"script", "img", "iframe", "object", "link"} == set()
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
    assert "\x1b" not in page + terminal


def test_the_page_with_importance_weights_needs_nothing_but_itself() -> None:
    page = page_of(report(trust=trust()))
    for _, attributes in Elements(page).found:
        assert not {"src", "href", "srcset"} & attributes.keys()
    assert not re.search(r"https?://|url\(|@import", page)
    drawn = re.findall(r"<svg [^>]*role=\"img\"[^>]*><title>[^<]+</title>", page)
    assert len(drawn) == page.count("<svg") == 9


@pytest.mark.parametrize(
    "changes",
    [
        {"has_evidence": False},
        {"has_evidence": False, "why_not": "found 3 rows", "calibration": (), "histogram": ()},
        {"auc": None, "matched_auc": None},
    ],
)
def test_a_trust_report_with_less_in_it_is_shown_too(changes: dict[str, Any]) -> None:
    weighted = report(trust=trust(**changes))
    for text in (page_of(weighted), " ".join(printed(weighted).split())):
        assert trust(**changes).verdict in text
    assert ("Importance weights of thumbs-down rows</title>" in page_of(weighted)) == ("has_evidence" not in changes)


def test_points_of_the_calibration_are_where_their_shares_are() -> None:
    bins = ((10, 0.42, 0.5), (20, 0.6, 0.78))
    picture = str(pictures.calibration_plot(bins))
    found = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', picture)]
    left, top, size = 150, 8, 250  # the axes go from 40 % to 80 %
    expected = [(left + size * (x - 0.4) / 0.4, top + size * (0.8 - y) / 0.4) for _, x, y in bins]
    assert found == [pytest.approx(point, abs=0.01) for point in expected]
    assert ">40%<" in picture
    assert ">80%<" in picture


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_a_calibration_with_a_single_share_can_be_drawn(share: float) -> None:
    picture = str(pictures.calibration_plot(((10, share, share),)))
    x, y = (float(value) for value in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', picture)[0])
    assert 150 <= x <= 400
    assert 8 <= y <= 258


def test_bars_of_weights_are_as_high_as_their_shares_on_a_logarithmic_axis() -> None:
    picture = str(pictures.weight_histogram([(0.25, 0.5, 0.1), (0.5, 1.0, 0.4), (1.0, 4.0, 0.2)]))
    sizes = re.findall(r'width="([\d.]+)" height="([\d.]+)" class="down"', picture)
    widths, heights = zip(*((float(width) + 0.8, float(height)) for width, height in sizes), strict=True)
    assert heights[1] / heights[0] == pytest.approx(4, rel=1e-3)
    assert heights[1] / heights[2] == pytest.approx(2, rel=1e-3)
    assert widths[2] / widths[0] == pytest.approx(2, rel=1e-3)
    even = re.search(r'<line x1="([\d.]+)"[^>]*class="limit"', picture)
    assert even
    assert float(even[1]) == pytest.approx(44 + (560 - 56) / 2, abs=0.01)  # 1 is halfway from 1/4 to 4
