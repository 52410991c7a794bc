"""The judge of two models' answers, with a server on this machine, and rates whose values are known."""

from __future__ import annotations

import json
import re
import runpy
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

JUDGE = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "judge.py"))


class Endpoint(BaseHTTPRequestHandler):
    """Prefers answers that are good; of two that are alike, the first."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
        first, second = (re.search(rf"Answer {name}:\n(.*)\n", asked)[1] for name in "AB")  # type: ignore[index]
        said = "B." if "good" in second and "good" not in first else "A"
        body = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_an_endpoint_is_asked_in_both_orders_and_a_contradiction_is_a_tie(endpoint: str, tmp_path: Path) -> None:
    ours = ["good", "good", "bad", "bad"]
    theirs = ["bad", "bad", "good", "bad"]
    for name, answers in (("ours", ours), ("theirs", theirs)):
        lines = [json.dumps({"prompt": f"{n}?", "answer": answer}) for n, answer in enumerate(answers)]
        (tmp_path / name).write_text("\n".join(lines))
    words = ["--answers", str(tmp_path / "ours"), "--against", str(tmp_path / "theirs"), "--endpoint", endpoint]
    found = JUDGE["main"](words)
    assert (found["pairs"], found["ties"]) == (4, 1)
    assert found["win_rate"][0] == (2 + 0.5) / 4


def test_a_judge_that_goes_by_length_alone_gives_even_odds_at_equal_length() -> None:
    random = np.random.default_rng(0)
    lengths = random.normal(50, 100, 2000)  # ours are longer
    wins = (random.random(2000) < 1 / (1 + np.exp(-lengths / 50))).astype(float)
    found = JUDGE["rates"](wins, lengths, np.arange(2000))
    assert found["win_rate"][0] > 0.6
    assert found["length_controlled"][1] < 0.5 < found["length_controlled"][2]


def test_answers_to_one_prompt_do_not_count_as_many() -> None:
    wins, lengths = np.repeat([1.0, 0.0] * 8, 10), np.zeros(160)
    low, high = JUDGE["rates"](wins, lengths, np.repeat(np.arange(16), 10))["win_rate"][1:]
    assert high - low > 0.4  # 160 prompts would give 0.15
