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

from bco_lightning import figures
from bco_lightning.data.counts import Counted, FeedbackSummary, RowCounts
from bco_lightning.errors import ConfigError
from bco_lightning.importance.report import TrustReport
from bco_lightning.inspection.cost import Cost
from bco_lightning.inspection.inspect import page_of, print_report
from bco_lightning.inspection.numbers import RowArrays, RowText
from bco_lightning.inspection.prompts import PromptShift
from bco_lightning.inspection.report import DataReport, Finding, length_bias, write_text
from bco_lightning.metrics import Auc

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" & 'so' {{ 7 * 7 }} [bold]\x1b[31m"
VOID = {"meta", "br", "img", "link", "input"}


def report(**changes: Any) -> DataReport:
    lengths, up = np.arange(1, 101), np.arange(100) < 70
    arrays = RowArrays(up, lengths, 3 * lengths, 4 * lengths, 3 * lengths, lengths)
    counts = RowCounts(
        "train",
        read=130,
        up=70,
        down=30,
        left_out={"no feedback": Counted(17, [f"{HOSTILE}.jsonl:1"]), "rating left at its default": Counted(9, [])},
        cut={"prompts cut": 3, "completions cut": 0},
        malformed=Counted(4, ["/home/ann/day/log.jsonl:5"]),
        by_source={f"logs/{HOSTILE}": (50, 10), "other": (20, 20)},
        columns={f"logs/{HOSTILE}": "not used: 'history', 'weight'"},
    )
    made = DataReport(
        model=f"model {HOSTILE}",
        counts=(counts, RowCounts("validation", read=11, up=6, down=5)),
        feedback=FeedbackSummary(100, 13, 2, {}),
        arrays=arrays,
        limits={"data.max_length": 256, "data.max_prompt_length": 64},
        cost=Cost(20_000, 9_000, 16, 7, 7, 1e12, (80.0, 1140.0), "this CPU"),
        prompts=PromptShift(100, 77, Auc(0.64, 0.55, 0.73), 0.66, tuple(np.linspace(0, 1, 51))),
        prompt_bias=Auc(0.7, 0.6, 0.8),
        bias=length_bias(arrays),
        personal_data={"e-mail addresses": (21, 22), "IBANs": (0, 0)},
        examples=(RowText(HOSTILE, f"answer {HOSTILE}", True, "log.jsonl:1"),),
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
        assert not {"src", "srcset"} & attributes.keys()
        assert all(str(attributes[name]).startswith("#") for name in {"href", "xlink:href"} & attributes.keys())
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"https?://(?!www.w3.org/)", page)  # names of the SVG format


def test_every_number_of_the_rows_is_on_the_page_and_in_the_terminal() -> None:
    page, terminal = page_of(report()), " ".join(printed(report()).split())
    for said in ("130", "17", "no feedback", "rating left at its default", "day/log.jsonl:5", "validation", "13"):
        assert said in page
        assert said in terminal
    assert "/home/ann" not in page + terminal
    over = "data.max_length 256: 36 rows over, data.max_prompt_length 64: 36 rows over"
    for said in ("0.640 (0.550 to 0.730)", "0.6600; 0.6931", "1.3 to 19 min", "21", over):
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
    assert len(re.findall(r'<figure role="img" aria-label="[^"]+"><svg', page)) == page.count("<svg") == 5


def test_on_a_phone_tables_scroll_in_themselves_and_rules_for_it_have_the_last_word() -> None:
    page = page_of(report())
    assert page.count('<div class="wide"><table>') == page.count("<table") > 0
    rules = page[: page.index("</style>")]
    assert rules.index("@media (max-width") > rules.rindex("grid-template-columns: 1fr 1fr")
    assert ".wide { overflow-x: auto; }" in rules
    assert 'name="viewport" content="width=device-width' in page


def test_a_limit_within_the_picture_is_drawn() -> None:
    lengths, up = np.arange(1, 101), np.arange(100) < 50
    near, far = (
        figures.to_svg(figures.length_histogram(lengths, up, "prompt", {"data.max_length": limit}))
        for limit in (64, 100_000)
    )
    assert "data.max_length 64" in near
    assert "data.max_length" not in far


def test_bars_of_lengths_have_the_shares_of_their_class() -> None:
    lengths, up = np.array([3, 3, 80, 120, 5, 90]), np.array([True, True, True, True, False, False])
    axes = figures.length_histogram(lengths, up, "prompt", {}).axes[0]
    heights = np.array([bar.get_height() for bar in axes.patches])
    assert heights[heights > 0].sum() == pytest.approx(1)
    assert heights[heights < 0].sum() == pytest.approx(-1)
    assert heights.max() == pytest.approx(0.5)  # two of four are 3 tokens long


def test_the_same_report_gives_the_same_page() -> None:
    assert page_of(report()) == page_of(report())


def test_a_report_of_one_class_without_an_end_or_a_time_is_shown_too() -> None:
    lengths, up = np.array([5, 5]), np.array([True, True])
    arrays = RowArrays(up, lengths, lengths, lengths, lengths, lengths)
    bare = report(
        arrays=arrays,
        bias=length_bias(arrays),
        prompts=PromptShift(2, 1, why_not="expected more"),
        prompt_bias=None,
        cost=Cost(10, 5, 16, 1, None, why_not="no shape"),
        counts=(RowCounts("train", read=2, up=2, by_source={"log": (2, 0)}),),
        notes=(Finding("problem", "fit would not start"),),
        feedback=None,
    )
    for text in (page_of(bare), printed(bare)):
        assert "no shape" in text
        assert "expected more" in text
        assert "fit would not start" in text
    assert bare.findings[0].level == "problem"


def test_columns_that_are_not_used_are_a_finding() -> None:
    assert ": not used: 'history', 'weight'." in " ".join(finding.text for finding in report().findings)


def test_findings_come_worst_first() -> None:
    order = ["problem", "warning", "note", "good"]
    levels = [finding.level for finding in report(notes=(Finding("problem", "x"),)).findings]
    assert levels == sorted(levels, key=order.index)
    assert {"problem", "warning", "note"} <= set(levels)


def test_a_page_that_cannot_be_written_is_an_error_of_the_option() -> None:
    with pytest.raises(ConfigError, match=r"--report: expected a file to write"):
        write_text(page_of(report()), Path(__file__) / "page.html", "--report")


# --- importance weights

TRUST = TrustReport(
    "reference",
    70.0,
    30.0,
    77,
    77,
    has_evidence=True,
    evidence=5.5,
    auc=Auc(0.71, 0.66, 0.76),
    log_loss=0.55,
    constant_log_loss=0.61,
    strengths=(0.01,),
    calibration=((50, 0.6, 0.58), (50, 0.8, 0.83)),
    histogram=((0.5, 1.0, 0.25), (1.0, 2.0, 0.75)),
    effective_share=0.05,
    matched_auc=Auc(0.5, 0.45, 0.55),
)


def test_without_importance_weights_there_is_no_section_of_them() -> None:
    assert "Importance weights of" not in page_of(report())
    assert "Importance weights of" not in printed(report())


def test_importance_weights_are_on_the_page_and_in_the_terminal_with_their_warnings() -> None:
    weighted = report(trust=TRUST)
    for text in (page_of(weighted), printed(weighted)):
        assert "0.710 (0.660 to 0.760)" in text
        assert "A few thumbs-down rows decide" in text
    assert page_of(weighted).count("<svg") == 7
    assert TRUST.verdict in [finding.text for finding in weighted.findings]
    Elements(page_of(weighted))


def test_bars_of_weights_are_as_high_as_their_shares() -> None:
    axes = figures.weight_histogram(TRUST.histogram).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.25, 0.75]
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize("lines", [2, 3, 5])
def test_a_legend_lies_above_the_picture_and_below_its_title(lines: int) -> None:
    figure = figures.curves("Loss", {f"runs/bco/version_{run}": [(0, 1.0), (9, 0.5)] for run in range(lines)})
    (axes,) = figure.axes
    figure.canvas.draw()
    legend, title = axes.get_legend().get_window_extent(), axes._left_title.get_window_extent()
    assert axes.get_window_extent().y1 <= legend.y0 + 1
    assert legend.y1 <= title.y0 + 4  # its frame, which is not drawn
