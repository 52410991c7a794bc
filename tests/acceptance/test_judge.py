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
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.reliability.tiny_run import byte_tokenizer

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


def test_a_reward_model_in_a_folder_judges_as_its_scores_say(tmp_path: Path) -> None:
    """A random one, whose scores are asked for a second time, of a text that is written out here."""
    tokenizer, folder = byte_tokenizer(), tmp_path / "reward"
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=1, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    answers = [("yes", "no"), ("no", "yes"), ("a long answer", "short"), ("same", "same")]
    scores = [[_score(model, tokenizer, answer) for answer in pair] for pair in answers]
    for name, own in zip(("ours", "theirs"), zip(*answers, strict=True), strict=True):
        (tmp_path / name).write_text("\n".join(json.dumps({"prompt": "Well?", "answer": each}) for each in own))
    words = ["--answers", str(tmp_path / "ours"), "--against", str(tmp_path / "theirs"), "--reward_model", str(folder)]
    found = JUDGE["main"](words)
    assert found["ties"] == 1
    assert found["win_rate"][0] == sum(ours > theirs for ours, theirs in scores) / 4 + 1 / 8


def _score(model: Any, tokenizer: Any, answer: str) -> float:
    text = f"<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    with torch.no_grad():
        return float(model(torch.tensor([tokenizer(text).input_ids])).logits[0, 0])


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
