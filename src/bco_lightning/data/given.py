"""Rows that Python holds: written into a file, so that they are read, kept and found again like any other log."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from bco_lightning.data.cache import remove_own
from bco_lightning.data.options import DataOptions, Source
from bco_lightning.data.remote import GIVEN, place_in, public_name
from bco_lightning.errors import FeedbackRowError


def with_given(options: DataOptions, given: Mapping[str, Any], owner: Any) -> DataOptions:
    """The options with a source more for each data set of which rows are given; their files go with the ``owner``."""
    given = {name: rows for name, rows in given.items() if rows is not None}
    if not given:
        return options
    folder = Path(tempfile.mkdtemp(prefix=GIVEN))
    weakref.finalize(owner, remove_own, folder, os.getpid())
    files: dict[str, Any] = {}
    for name, rows in given.items():
        files[f"{name}_files"] = [*options.sources(name), Source(str(_written(rows, folder / name)), name)]
    return replace(options, **files)


def _written(rows: Any, stem: Path) -> Path:
    """The file of some rows, of a kind that keeps what they are and that can be read from the middle."""
    lines, name = stem.with_suffix(".jsonl"), public_name(f"{stem}.jsonl")
    if isinstance(rows, IterableDataset):
        own = stem.with_name(f".{stem.name}")
        rows = Dataset.from_generator(rows.__iter__, features=rows.features, cache_dir=str(own))
    if isinstance(rows, Dataset):
        rows.to_parquet(table := stem.with_suffix(".parquet"))
        return table
    try:
        if hasattr(rows, "to_json"):  # of pandas, which makes null of its gaps
            rows.to_json(lines, orient="records", lines=True, double_precision=15, force_ascii=False)
            return lines
        with lines.open("w", encoding="utf-8") as file:
            for number, row in enumerate(rows, 1):
                name = place_in(public_name(str(lines)), number)
                file.write(json.dumps(row, ensure_ascii=False, default=lambda value: value.tolist()) + "\n")  # of NumPy
    except (TypeError, ValueError, AttributeError) as error:
        expected = "expected dictionaries of plain values, a data set of datasets or a frame of pandas"
        raise FeedbackRowError(name, f"{expected}, found what JSON cannot hold.") from error
    return lines
