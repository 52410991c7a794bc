"""Public data sets are read by the options that the documentation names, with the counts that it names."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from bco_lightning.batch import FeedbackRow, LeftOut
from bco_lightning.data.options import DataOptions, Source
from bco_lightning.data.presets import PRESETS
from bco_lightning.data.row_sets import row_format_of
from bco_lightning.data.rows import RatedRow, RowMaker
from tests.unit.made_rows import rows_of

FOLDER = Path(__file__).parent.parent / "data" / "feedback_logs" / "public"
DOCS = Path(__file__).parent.parent.parent / "docs" / "feedback_logs.md"
_ROW = re.compile(r"^\| \[`([^`]+)`\]\(\S+\) \| (.+?) \| (\d+ rows: .+?) \| .+ \|$", re.MULTILINE)
# Data set, options on the command line, what becomes of the records here.
SETS: list[tuple[str, str, str]] = _ROW.findall(DOCS.read_text(encoding="utf-8"))
FILE_OF = {"oasst2": "oasst2.trees.jsonl", "toxic-chat": "toxic-chat.csv"}


def source_of(name: str, options: str) -> Source:
    """The source that a row of the table describes."""
    known: dict[str, Any] = {}
    words = shlex.split(options.strip("`")) if options != "none" else []
    for option, value in zip(words[::2], words[1::2], strict=True):
        at, *way = option.removeprefix("--data.").split(".")
        known |= {at: {**known.get(at, {}), way[0]: yaml.safe_load(value)} if way else yaml.safe_load(value)}
    name = name.rpartition("/")[2].replace(" ", "-")
    return Source(str(FOLDER / FILE_OF.get(name, f"{name}.jsonl")), name=name, **known)


def outcomes_of(source: Source) -> list[RatedRow]:
    return list(rows_of(source.path, RowMaker(row_format_of(DataOptions(), source))))


def counted(outcomes: list[RatedRow]) -> str:
    rows = [row for row in outcomes if isinstance(row, FeedbackRow)]
    up = sum(bool(row.thumbs_up) for row in rows)
    reasons = Counter(row.reason for row in outcomes if isinstance(row, LeftOut))
    malformed = len(outcomes) - len(rows) - reasons.total()
    out = [f"{count} left out ({reason})" for reason, count in reasons.items()]
    out += [f"{malformed} malformed"] if malformed else []
    return ", ".join([f"{len(outcomes)} rows: {up} up, {len(rows) - up} down", *out])


@pytest.mark.parametrize(("name", "options", "counts"), SETS, ids=[f"{name} {options}" for name, options, _ in SETS])
def test_a_public_set_is_read_as_the_table_says(name: str, options: str, counts: str) -> None:
    assert counted(outcomes_of(source_of(name, options))) == counts


def test_every_set_here_and_every_preset_is_in_the_table() -> None:
    assert {Path(source_of(name, options).path).name for name, options, _ in SETS} == {
        path.name for path in FOLDER.iterdir()
    }
    assert set(PRESETS) == {source_of(name, options).preset for name, options, _ in SETS} - {None}
