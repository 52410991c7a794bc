"""Every format gives records with their place; what is malformed is refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from bco_lightning.data.readers import read_records
from bco_lightning.errors import ConfigError, FeedbackRowError

ROWS = [
    {"prompt": "Grüß Gott?", "completion": "Servus, 👋.", "label": True},
    {"prompt": 'a "quoted", word', "completion": "two\nlines", "label": False},
]


def records(source: Path | str) -> list[dict[str, Any]]:
    found = []
    for _, record in read_records(str(source), "label"):
        if isinstance(record, FeedbackRowError):
            raise record
        found.append(dict(record))
    return found


def places(source: Path | str) -> list[str]:
    return [place for place, _ in read_records(str(source), "label")]


def test_jsonl_csv_parquet_and_data_set_folders_give_the_same_records(tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    dataset.to_csv(tmp_path / "a.csv")
    dataset.to_parquet(tmp_path / "a.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    dataset.to_parquet(folder / "train.parquet")
    for source in (tmp_path / "a.jsonl", tmp_path / "a.csv", tmp_path / "a.parquet", f"hub:{folder}"):
        assert records(source) == ROWS, source


def test_places_are_lines_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    assert places(path) == [f"{path}:1", f"{path}:3"]


def test_a_csv_place_is_the_last_line_of_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,label\n"two\nlines",1\nb,-1\n', encoding="utf-8")
    assert places(path) == [f"{path}:3", f"{path}:4"]
    assert [record["label"] for record in records(path)] == [1, -1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: expected one JSON object per line, found malformed JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2: expected a JSON object, found a list"),
        ("a.jsonl", b'{"a": NaN}\n', r"a\.jsonl:1: .*NaN"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: "),
        ("a.jsonl", b'{"a": "\xe9"}\n', r"a\.jsonl:1: expected UTF-8, found byte 0xe9 at column 8"),
        ("a.jsonl", b'\xef\xbb\xbf{"a": 1}\n', r"a\.jsonl:1: .*byte order mark"),
        ("a.csv", b"a,b\n1,\xff\n", r"a\.csv:2: expected UTF-8"),
        ("a.csv", b"a,b\n1\n", r"a\.csv:2: expected 2 cells"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv:2: expected 2 cells"),
        ("a.parquet", b"no parquet at all", r"a\.parquet: expected a Parquet file"),
        ("a.txt", b"x", r"expected a file ending in \.jsonl"),
    ],
)
def test_what_is_malformed_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FeedbackRowError, match=message):
        records(path)


@pytest.mark.parametrize("name", ["missing.jsonl", "hub:no/such-data-set"])
def test_a_missing_source_is_named(name: str) -> None:
    with pytest.raises(FeedbackRowError, match=name):
        records(name)


@pytest.mark.parametrize(
    "name",
    ["package:no_such_package/x.jsonl", "package:bco_lightning/nope.jsonl", "package:bco_lightning/../../x.jsonl"],
)
def test_a_missing_packaged_file_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match="package:"):
        records(name)
