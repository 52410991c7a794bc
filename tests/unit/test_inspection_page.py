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

from bco_lightning.auc import Auc
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
