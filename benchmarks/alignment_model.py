"""SmolLM2-135M-Instruct with LoRA, on thumbs drawn anew for the answers of the demonstration: the second scale.

A run is ``bco_lightning fit`` with ``configs/bco.yaml``, its own thumbs, objective, beta and seed, and the trial of
the known reward; ``results/alignment_model.json`` keeps each, and what is there is not run again. Two rewards:
``tone``, VADER's compound score, which adds up over words, and ``neutral``, its share of warm less that of hostile
words, which does not. Thumbs are drawn from either, and samples are judged by both. Three seeds of all of it take some
hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import machine
from bco_lightning.demo.tone import tone
from bco_lightning.inspection.run_record import RunRecord
from bco_lightning.places import resolve_packaged

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "alignment_model.json"
SHARPNESS = 6.0  # of the demonstration
SETTINGS = {"pairs": ("bco", "bce", "kto", "dpo"), "balanced": ("bco", "bce", "kto"), "10 % up": ("bco", "bce", "kto")}
BETAS = (0.1, 0.3)
_SCORES = SentimentIntensityAnalyzer()


def neutral(text: str) -> float:
    """Share of warm less that of hostile words, in units of a like spread as the tone's; length plays no part."""
    scores = _SCORES.polarity_scores(text)
    return 2.0 * float(scores["pos"] - scores["neg"])


REWARDS: dict[str, Callable[[str], float]] = {"tone": tone, "neutral": neutral}


def draw_thumbs(setting: str, reward: str, seed: int, part: str) -> list[dict[str, Any]]:
    """Rows with thumbs drawn from a reward: pairs of a prompt's answers by Bradley and Terry, or answers one by one."""
    text = Path(resolve_packaged(f"package:bco_lightning/demo/{part}.jsonl")).read_text(encoding="utf-8")
    answers, generator = [json.loads(line) for line in text.splitlines()], random.Random(seed)  # noqa: S311
    scores = [SHARPNESS * REWARDS[reward](answer["completion"]) for answer in answers]

    def likes(gain: float) -> bool:
        return generator.random() < 1 / (1 + math.exp(-gain))

    if setting != "pairs":
        share = {"balanced": 0.5, "10 % up": 0.1}[setting]
        low, high = -30.0, 30.0
        for _ in range(60):
            middle = (low + high) / 2
            too_many = fmean(1 / (1 + math.exp(middle - score)) for score in scores) > share
            low, high = (middle, high) if too_many else (low, middle)
        return [answer | {"label": likes(score - low)} for answer, score in zip(answers, scores, strict=True)]
    of_prompts = defaultdict(list)
    for answer, score in zip(answers, scores, strict=True):
        of_prompts[answer["prompt"]].append((answer["completion"], score))
    rows = []
    for prompt, own in of_prompts.items():
        generator.shuffle(own)
        for (first, one), (second, other) in zip(own[::2], own[1::2], strict=False):
            chosen, rejected = (first, second) if likes(one - other) else (second, first)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def run(setting: str, reward: str, objective: str, beta: float, seed: int, more: list[str]) -> dict[str, Any]:
    """Fits once; what the trial of the known reward found, and what the newest samples are worth by either reward."""
    with tempfile.TemporaryDirectory() as folder:
        logs = {part: Path(folder) / f"{part}.jsonl" for part in ("train", "heldout")}
        for part, log in logs.items():
            log.write_text("".join(json.dumps(row) + "\n" for row in draw_thumbs(setting, reward, seed, part)), "utf-8")
        command = [sys.executable, "-m", "bco_lightning", "fit", "--config", str(ROOT / "configs" / "bco.yaml")]
        values = {"seed_everything": seed, "run_folder": f"{folder}/run", "data.train_files": logs["train"]}
        values |= {
            "data.validation_files": logs["heldout"],
            "model.objective": objective,
            "model.beta": beta,
            "samples.prompts": 64,
        }
        given = [part for name, value in values.items() for part in (f"--{name}", str(value))]
        subprocess.run([*command, *given, *more], check=True, cwd=ROOT)
        record = RunRecord.read(Path(folder) / "run" / "version_0")
        gains = {
            name: fmean(of(sample["policy"]) - of(sample["reference"]) for sample in record.newest_samples)
            for name, of in REWARDS.items()
        }
        return {"alignment": record.alignment, "gains_of_samples": gains}


def main() -> None:
    """Runs what is missing and prints a line of each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--try", dest="is_trial", action="store_true", help="one run of two steps; writes nothing")
    options = parser.parse_args()
    if options.is_trial:
        few = "--trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.limit_val_batches 1 --samples.prompts 2"
        few += " --known_reward.max_prompts 2 --known_reward.samples_per_prompt 1"
        print(json.dumps(run("pairs", "neutral", "dpo", 0.1, 0, few.split())))
        return
    found = json.loads(RESULTS.read_text("utf-8"))["runs"] if RESULTS.exists() else {}
    for seed, reward, setting in product(range(options.seeds), REWARDS, options.settings):
        for objective, beta in product(SETTINGS[setting], BETAS):
            key = f"{setting} | {reward} | {objective} | {beta} | {seed}"
            if key not in found:
                found[key] = run(setting, reward, objective, beta, seed, [])
                RESULTS.write_text(json.dumps({"machine": machine.describe(), "runs": found}, indent=1) + "\n", "utf-8")
            print(key, json.dumps(found[key]))


if __name__ == "__main__":
    main()
