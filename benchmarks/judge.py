"""Two models' answers side by side: win rate and length-controlled win rate, with 95 % intervals over prompts.

    python benchmarks/judge.py --answers mine.jsonl --against base.jsonl --reward_model FOLDER
    OPENAI_API_KEY=... python benchmarks/judge.py --answers mine.jsonl --against base.jsonl \
        --endpoint http://localhost:8000/v1 --model NAME

Each line of a file is ``{"prompt": TEXT, "answer": TEXT}``; both files have the same prompts, in the same order, a
prompt as often as it was answered. A language model is asked in both orders; where it contradicts itself, and where it
names neither answer, the pair is a tie. A reward model (``AutoModelForSequenceClassification`` with one output and a
chat template) scores each answer by itself. Nothing is downloaded from a hub where ``HF_HUB_OFFLINE=1`` is set.

The length-controlled win rate is a logistic regression of the outcome on the difference of lengths, in characters and
standard deviations, at a difference of 0: AlpacaEval 2's (arXiv:2404.04475) without its term for each instruction.
"""

from __future__ import annotations

import argparse
import json
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_DRAWS = 500
_ASKED = (
    "Which answer to the question is better? Lengths and the order of the answers are no reasons.\n\n"
    "Question:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\nSay A or B, and nothing else."
)


def endpoint_judge(url: str, model: str) -> Callable[[str, str, str], float]:
    """A judge behind an OpenAI-compatible endpoint, asked in both orders: 1 for the first answer, 0 for the other."""

    def prefers_first(prompt: str, first: str, second: str) -> float:
        asked = {"role": "user", "content": _ASKED.format(prompt=prompt, first=first, second=second)}
        body = json.dumps({"model": model, "messages": [asked], "temperature": 0, "max_tokens": 8}).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", body, headers)  # noqa: S310
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            said = json.load(answer)["choices"][0]["message"]["content"].strip().upper()
        return {"A": 1.0, "B": 0.0}.get(said[:1], 0.5)

    def judge(prompt: str, ours: str, theirs: str) -> float:
        both = prefers_first(prompt, ours, theirs), 1 - prefers_first(prompt, theirs, ours)
        return both[0] if both[0] == both[1] else 0.5

    return judge


def reward_judge(folder: str) -> Callable[[str, str, str], float]:
    """A local reward model: the answer with the larger score wins."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    model.eval()

    def score(prompt: str, answer: str) -> float:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        with torch.no_grad():
            return float(model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0])

    def judge(prompt: str, ours: str, theirs: str) -> float:
        found = score(prompt, ours), score(prompt, theirs)
        return 0.5 if found[0] == found[1] else float(found[0] > found[1])

    return judge


def rates(wins: Array, lengths: Array, prompts: Array, seed: int = 0) -> dict[str, list[float]]:
    """Win rate and length-controlled win rate, each with the ends of its interval, by drawing prompts anew.

    Args:
        wins: 1, 0 or 0.5 for each pair of answers.
        lengths: Length of ours less that of theirs.
        prompts: The same number for the same prompt.
        seed: Of the draws.
    """
    rows_of = [np.flatnonzero(prompts == number) for number in np.unique(prompts)]
    random, whole = np.random.default_rng(seed), np.arange(len(wins))
    chosen = [
        np.concatenate([rows_of[at] for at in random.integers(len(rows_of), size=len(rows_of))]) for _ in range(_DRAWS)
    ]
    found = {
        "win_rate": lambda rows: float(wins[rows].mean()),
        "length_controlled": lambda rows: _at_equal_length(wins[rows], lengths[rows]),
    }
    return {
        name: [of(whole), *np.quantile([of(rows) for rows in chosen], [0.025, 0.975]).tolist()]
        for name, of in found.items()
    }


def _at_equal_length(wins: Array, lengths: Array) -> float:
    """The fitted share of wins where lengths are equal; a tie is half a win."""
    spread = lengths.std()
    if not spread or not 0 < wins.mean() < 1:
        return float(wins.mean())
    features = np.stack([np.ones(len(wins)), lengths / spread], axis=1)
    fitted = np.zeros(2)
    for _ in range(20):  # Newton's method, with a ridge for outcomes that lengths tell apart
        expected = 1 / (1 + np.exp(-np.clip(features @ fitted, -30, 30)))
        slope = features.T @ (wins - expected) - 0.01 * fitted
        fitted += np.linalg.solve((features.T * expected * (1 - expected)) @ features + 0.01 * np.eye(2), slope)
    return float(1 / (1 + np.exp(-fitted[0])))


def read(path: str) -> list[dict[str, str]]:
    """The lines of a file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def main(words: list[str] | None = None) -> dict[str, Any]:
    """Judges two files, prints and returns what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("answers", "against"):
        parser.add_argument(f"--{name}", required=True)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--reward_model")
    kind.add_argument("--endpoint")
    parser.add_argument("--model", default="default")
    given = parser.parse_args(words)
    ours, theirs = read(given.answers), read(given.against)
    if [row["prompt"] for row in ours] != [row["prompt"] for row in theirs]:
        raise SystemExit("error: expected the same prompts in the same order in both files, found others.")
    judge = reward_judge(given.reward_model) if given.reward_model else endpoint_judge(given.endpoint, given.model)
    wins = np.array([judge(a["prompt"], a["answer"], b["answer"]) for a, b in zip(ours, theirs, strict=True)])
    lengths = [np.array([len(row["answer"]) for row in rows], dtype=float) for rows in (ours, theirs)]
    prompts = np.unique([row["prompt"] for row in ours], return_inverse=True)[1]
    told = {"pairs": len(wins), "ties": int((wins == 0.5).sum()), **rates(wins, lengths[0] - lengths[1], prompts)}
    told["mean_length"] = [float(each.mean()) for each in lengths]
    print(json.dumps(told, indent=2))
    return told


if __name__ == "__main__":
    main()
