"""Data sets of the hub: no card has files of others fetched, and what is kept of rows is its owner's alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import pytest

from bco_lightning.data.records import record_file
from bco_lightning.errors import FeedbackRowError
from tests.trials import Trials

ROW = '{"prompt": "q", "completion": "a", "label": true}\n'
# What stands for the files in a card; @ is the address of a server.
FILES = {
    "an address": "data_files: http://@/x.jsonl",
    "addresses of splits": "data_files: [{split: train, path: 'http://@/x.jsonl'}]",
    "an address in other letters": 'data_files: "ht\\x74p:\\x2f\\x2f@/x.jsonl"',
    "an address by an alias": "x: &a http://@/x.jsonl\n  data_files: *a",
    "an archive at an address": "data_files: zip://x.jsonl::http://@/x.zip",
    "a folder at an address": "data_dir: http://@/x",
    "a file above": "data_files: ../outside.jsonl",
    "a file anywhere": "data_files: /etc/hostname",
    "another data set": "data_files: hf://datasets/other/set/x.jsonl",
}


@pytest.fixture
def asked() -> Iterator[list[str]]:
    """What a server was asked for; its address is the first item."""
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked.append(f"127.0.0.1:{server.server_port}")
    yield asked
    server.shutdown()


@pytest.mark.promise("S10", "a card of a hub data set has no files of others fetched, and no folder above it read")
def test_a_card_fetches_nothing(trials: Trials, tmp_path: Path, asked: list[str]) -> None:
    (tmp_path / "outside.jsonl").write_text(ROW)
    for trial in trials([(name, card) for name in FILES for card in ("README.md", ".huggingface.yaml")], quick=18):
        with trial as (name, card):
            folder = tmp_path / f"{name} {card}"
            folder.mkdir()
            configs = f"configs:\n- config_name: default\n  {FILES[name].replace('@', asked[0])}\n"
            (folder / card).write_text(f"---\n{configs}---\n" if card == "README.md" else configs)
            with pytest.raises(FeedbackRowError, match="a data set of its own files, found a card that names others"):
                list(record_file(f"hub:{folder}"))
            assert len(asked) == 1


def test_what_is_kept_of_a_data_set_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jsonl").write_text(ROW)
    card = "---\nhomepage: https://example.invalid\nconfigs:\n- config_name: default\n  data_files: ['*.jsonl']\n---\n"
    (folder / "README.md").write_text(card)
    assert len(list(record_file(f"hub:{folder}"))) == 1
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert any(path.suffix == ".arrow" for path in kept)
    assert not [path for path in kept if path.stat().st_mode & 0o077]
